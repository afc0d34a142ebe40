"""Captures inside data-parallel training in two processes, each of which records its own images."""

import copy

import lightning
import pytest
import torch
import torch.distributed
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from tests.capture import models
from tests.capture.models import kept
from visionattn.capture import FullAttention, capture

close = torch.testing.assert_close


def assert_same_records(found, expected):
    assert [record.name for record in found] == [record.name for record in expected]
    for record, reference in zip(found, expected, strict=True):
        close(record.weights, reference.weights, atol=1e-6, rtol=0)


def run_one_process(rank, rendezvous_file):
    """Capture and train in one of two processes. `start_processes` raises an error of this function in the test."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{rendezvous_file}", rank=rank, world_size=2)
    images, labels = models.pictures(batch=4), torch.tensor([0, 3, 6, 3])
    own_images = slice(2 * rank, 2 * rank + 2)
    bare = models.vit(depth=2).train()
    expected, reference_model = kept(bare, images[own_images], FullAttention()), copy.deepcopy(bare)
    model = DistributedDataParallel(bare)
    before = models.state_of(bare)
    assert_same_records(kept(model, images[own_images], FullAttention()), expected)
    models.assert_same_state(before, models.state_of(bare))

    nn.functional.cross_entropy(reference_model(images), labels).backward()
    for watched in (False, True):  # the first step follows a capture, the second runs inside a capture
        model.zero_grad()
        if watched:
            with capture(model, FullAttention()) as records:
                out = model(images[own_images])
            assert_same_records(records, expected)
        else:
            out = model(images[own_images])
        nn.functional.cross_entropy(out, labels[own_images]).backward()
        for (name, parameter), reference in zip(bare.named_parameters(), reference_model.parameters(), strict=True):
            close(parameter.grad, reference.grad, atol=1e-6, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
    assert models.state_of(bare)["hooks"] == before["hooks"]
    torch.distributed.destroy_process_group()


def test_ddp_processes_record_their_own_images_and_average_gradients_over_all_images(tmp_path):
    start_processes(run_one_process, (tmp_path / "rendezvous",), nprocs=2, start_method="forkserver")


class Capturing(lightning.LightningModule):
    """Captures attention in each validation step, and writes it into a folder."""

    def __init__(self, folder):
        super().__init__()
        self.folder, self.network = folder, models.vit(depth=2).train()

    def training_step(self, batch, index):
        return self.network(batch).square().mean()

    def validation_step(self, batch, index):
        with capture(self.network, FullAttention()) as records:
            self.network(batch)
        weights = {record.name: record.weights for record in records}
        torch.save(weights, self.folder / f"{self.global_rank} {index}.pt")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.0)


@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # a remark of torch on speed
def test_capture_works_in_a_lightning_validation_step_with_ddp(tmp_path):
    pictures = torch.utils.data.DataLoader(models.pictures(batch=4))
    trainer = lightning.Trainer(
        strategy=DDPStrategy(start_method="forkserver"),
        devices=2,
        accelerator="cpu",
        max_epochs=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Capturing(tmp_path), pictures, pictures)
    expected = kept(models.vit(depth=2), models.pictures(batch=4), FullAttention())
    assert len(list(tmp_path.glob("*.pt"))) == 4
    for rank in range(2):
        for step in range(2):  # the sampler gives images 0 and 2 to process 0, and images 1 and 3 to process 1
            found = torch.load(tmp_path / f"{rank} {step}.pt")
            assert list(found) == [record.name for record in expected]
            for record in expected:
                close(found[record.name][0], record.weights[2 * step + rank], atol=1e-6, rtol=0)
