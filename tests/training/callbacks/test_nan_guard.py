"""Test that a loss that is not finite stops the training or that its step is skipped."""

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.tasks.oracle import Oracle, Samples, sample, trainer
from visionattn.errors import DataError
from visionattn.tasks import Detection
from visionattn.training.callbacks.nan_guard import NaNGuard


def test_error_for_a_nan_loss_names_the_term_and_the_images():
    task = Detection(Oracle(terms={"good": 1.0, "box": float("nan")}))
    data = Samples([sample(0, [], []), sample(1, [], [])])
    with pytest.raises(DataError, match=r"step 0 .* is nan \(train/loss_box nan\); its images: 0\.png, 1\.png;"):
        trainer(limit_val_batches=0, callbacks=[NaNGuard()]).fit(task, datamodule=data)


def test_step_with_nan_loss_is_skipped():
    oracle = Oracle(terms={"box": float("nan")})
    skip = NaNGuard(on_nan="skip")
    trainer(limit_val_batches=0, callbacks=[skip]).fit(Detection(oracle), datamodule=Samples([sample(0, [], [])]))
    assert skip.skipped == 1
    assert oracle.weight.item() == 1  # the initial value


class Normalised(L.LightningModule):
    """A network with BatchNorm, whose batches are rows of numbers."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.head = nn.Linear(3, 1)

    def training_step(self, batch, batch_idx):
        return self.head(self.norm(batch)).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_skipped_step_leaves_the_statistics_of_batchnorm_unchanged(accumulate):
    rows = torch.randn(16, 3, generator=torch.Generator().manual_seed(0))
    task, expected = Normalised(), nn.BatchNorm1d(3)
    for batch in (rows[:4], rows[4:8], rows[12:]):
        expected(batch)
    rows[9] = float("nan")
    loader = DataLoader(rows, batch_size=4)
    skip = NaNGuard(on_nan="skip")
    trainer(callbacks=[skip], accumulate_grad_batches=accumulate, limit_val_batches=0).fit(task, loader)
    assert skip.skipped == 1
    torch.testing.assert_close(dict(task.norm.named_buffers()), dict(expected.named_buffers()))
