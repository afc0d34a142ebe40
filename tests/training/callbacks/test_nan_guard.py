"""A loss that is not finite ends the training, or its step is skipped."""

import pytest

from tests.tasks.oracle import Oracle, Samples, sample, trainer
from visionattn.errors import DataError
from visionattn.tasks import Detection
from visionattn.training.callbacks.nan_guard import NaNGuard


def test_a_loss_that_is_not_finite_ends_the_training_and_names_the_images():
    """And the term, which the task logs apart."""
    task = Detection(Oracle(terms={"good": 1.0, "box": float("nan")}))
    data = Samples([sample(0, [], []), sample(1, [], [])])
    with pytest.raises(DataError, match=r"step 0 .* is nan \(train/loss_box nan\); its images: 0\.png, 1\.png;"):
        trainer(limit_val_batches=0, callbacks=[NaNGuard()]).fit(task, datamodule=data)


def test_a_step_with_nan_is_skipped():
    oracle = Oracle(terms={"box": float("nan")})
    skip = NaNGuard(on_nan="skip")
    trainer(limit_val_batches=0, callbacks=[skip]).fit(Detection(oracle), datamodule=Samples([sample(0, [], [])]))
    assert skip.skipped == 1
    assert oracle.weight.item() == 1
