"""Overlays in the validation loop of any LightningModule: plain batches, TensorBoard and W&B."""

import os

import lightning as L
import numpy as np
import pytest
import torch
import wandb
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from tests.refusals import refuses
from visionattn.data import Placement, Preprocess
from visionattn.errors import UsageError
from visionattn.maps import GradCAM, Rollout
from visionattn.training import OverlaySamples
from visionattn.training.callbacks import sample_sheet
from visionattn.training.callbacks.plain_batches import convert, is_plain

QUIET = {
    "accelerator": "cpu",
    "max_epochs": 2,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
    "log_every_n_steps": 1,
}


class Own(L.LightningModule):
    """A module of a user, which knows nothing of visionattn: batches (images, labels), and its own forward."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 3)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val/loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def loader():
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(6, 3, 24, 32), torch.arange(6) % 3), batch_size=3)


def test_overlays_of_any_module_reach_tensorboard_and_wandb(loader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent = []
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, step: sent.append((key, step, images[0])))
    loggers = [TensorBoardLogger("logs"), WandbLogger(save_dir="logs", offline=True)]
    module = Own()
    callback = OverlaySamples(num_images=2, method=GradCAM())
    L.Trainer(logger=loggers, callbacks=[callback], **QUIET).fit(module, loader, loader)
    wandb.finish()
    folder = tmp_path / "logs" / "lightning_logs" / "version_0"
    files = sorted((folder / "overlays").iterdir())
    assert [file.name for file in files] == ["epoch_000.jpg", "epoch_001.jpg"]
    assert [(key, step) for key, step, _ in sent] == [("overlays", 1), ("overlays", 3)]
    events = EventAccumulator(str(folder), size_guidance={"images": 0})
    events.Reload()
    assert [event.step for event in events.Images("overlays")] == [1, 3]
    for file, (_, _, picture) in zip(files, sent, strict=True):
        with Image.open(file) as read:
            assert np.abs(np.asarray(read, int) - picture).mean() < 8  # JPEG
    assert module.training  # the callback leaves the module as it was
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_sheet_shows_the_images_the_answers_and_the_heatmaps_of_the_module(loader, monkeypatch):
    tiles = []
    monkeypatch.setattr(sample_sheet, "sheet", lambda drawn, **_: tiles.extend(drawn) or np.zeros((9, 9, 3), np.uint8))
    module, known = Own().eval(), Preprocess(mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
    images, labels = next(iter(loader))
    callback = OverlaySamples(num_images=2, method=GradCAM(), preprocess=known)
    L.Trainer(logger=False, callbacks=[callback], **QUIET | {"max_epochs": 1, "limit_train_batches": 0}).fit(
        module, loader, loader
    )
    assert tiles == []  # no epoch was trained
    batch, sources = convert([images, labels], known, 2)
    maps = sample_sheet.explain(GradCAM(), module, batch)
    sample_sheet.picture_of(batch, maps, module, sources, "")
    scores = module(images).softmax(1)
    for number in range(2):
        answer = int(scores[number].argmax())
        assert tiles[2 * number].caption == [f"{answer} {scores[number, answer]:.2f}", f"is {labels[number]}"]
        assert tiles[2 * number].right == (answer == labels[number])
        expected = ((images[number] * 0.25 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0).byte().numpy()
        assert np.abs(tiles[2 * number].picture.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("logger", [False, "wandb"])
def test_without_a_folder_of_its_own_the_run_writes_no_files(logger, loader, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "overlays").mkdir()
    (tmp_path / "overlays" / "epoch_000.jpg").write_text("mine")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sent = []
    monkeypatch.setattr(WandbLogger, "log_image", lambda self, key, images, step: sent.append(key))
    chosen = WandbLogger(save_dir=str(tmp_path), offline=True) if logger else False
    L.Trainer(logger=chosen, callbacks=[OverlaySamples()], **QUIET).fit(Own(), loader, loader)
    wandb.finish()
    assert (tmp_path / "overlays" / "epoch_000.jpg").read_text() == "mine"
    assert os.listdir(tmp_path / "overlays") == ["epoch_000.jpg"]
    assert sent == (["overlays", "overlays"] if logger else [])


def test_method_that_does_not_fit_is_refused_before_the_first_epoch(loader, tmp_path):
    trainer = L.Trainer(logger=CSVLogger(tmp_path), callbacks=[OverlaySamples(method=Rollout())], **QUIET)
    refuses(UsageError, "rollout needs", trainer.fit, Own(), loader, loader)


@pytest.mark.parametrize("form", ["tuple", "dict", "tensor"])
def test_images_and_labels_are_found_in_a_batch(form):
    images, labels = torch.randn(4, 1, 6, 8), torch.tensor([3, 1, 2, 0])
    batch = {
        "tuple": (images, labels),
        "dict": {"weight": torch.ones(4), "pixel_values": images, "names": list("abcd"), "labels": labels},
        "tensor": images,
    }[form]
    assert is_plain(batch)
    found, sources = convert(batch, None, 3)
    torch.testing.assert_close(found["image"], images[:3])
    assert ("label" in found) == (form != "tensor")
    if "label" in found:
        assert found["label"].tolist() == [3, 1, 2]
    picture = sources.read_source(found["path"][2])
    expected = (images[2, 0].clamp(0, 1) * 255).round().byte().numpy()
    np.testing.assert_array_equal(picture, np.stack([expected] * 3, 2))
    assert found["placement"][2].source_size == (6, 8)


def test_batches_of_visionattn_are_not_converted_and_batches_without_images_are_refused():
    assert not is_plain({"image": torch.zeros(1, 3, 4, 4), "placement": [Placement.identity((4, 4))]})
    refuses(UsageError, "hold no images", convert, (torch.zeros(4, 9), torch.zeros(4)), None, 2)
    refuses(UsageError, "hold no images", convert, "text", None, 2)


@pytest.mark.parametrize("channels", [2, 4])
def test_images_of_other_than_1_or_3_channels_are_refused(channels):
    refuses(UsageError, f"1 or 3 channels, got {channels}", convert, torch.rand(2, channels, 8, 8), None, 2)


@pytest.mark.timeout(90)
@pytest.mark.filterwarnings("ignore:Grad strides do not match")  # a remark of torch on speed
def test_the_first_of_two_processes_writes_the_overlays(tmp_path):
    """Each process must ask for the folder, because Lightning sends it from the first process to the other ones."""
    torch.manual_seed(0)
    loader = DataLoader(TensorDataset(torch.randn(8, 3, 24, 32), torch.arange(8) % 3), batch_size=2)
    trainer = L.Trainer(
        **QUIET,
        strategy=DDPStrategy(start_method="forkserver"),
        devices=2,
        logger=CSVLogger(tmp_path),
        callbacks=[OverlaySamples(method=GradCAM("features.2"))],
    )
    trainer.fit(Own(), loader, loader)
    assert sorted(path.name for path in tmp_path.rglob("*.jpg")) == ["epoch_000.jpg", "epoch_001.jpg"]
