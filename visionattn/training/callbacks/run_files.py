"""Helpers that the callbacks share: the run's folder, its loggers, its data, and CSV files."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, cast

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from torch import nn

from visionattn.data import Batch


class SourceImages(Protocol):
    """A data set that can read the source image of a sample."""

    def read_source(self, path: str, /) -> NDArray[np.uint8]: ...


class _HasImages(Protocol):
    dataset: SourceImages


def is_dev_run(trainer: L.Trainer) -> bool:
    """Return whether this is a `fast_dev_run`, which leaves no files."""
    return bool(getattr(trainer, "fast_dev_run", False))


def datamodule_of(trainer: L.Trainer) -> object:
    """Return the data module of a trainer, or None."""
    return getattr(trainer, "datamodule", None)


def network_of(pl_module: L.LightningModule) -> nn.Module:
    """Return the network of a task."""
    network = pl_module.network
    assert isinstance(network, nn.Module)
    return network


def class_names_of(owner: object) -> Sequence[str]:
    """Return the class names of a task or data module; empty if it has none."""
    names: Sequence[str] = getattr(owner, "class_names", ())
    return names


def _folder(trainer: L.Trainer) -> Path | None:
    """Return the folder of a run's overlays, or None for a run that leaves no files."""
    if is_dev_run(trainer) or trainer.log_dir is None:
        return None
    return Path(trainer.log_dir) / "overlays"


def _show(trainer: L.Trainer, name: str, picture_HWC: NDArray[np.uint8]) -> None:
    """Send a picture to the loggers that accept pictures: TensorBoard and W&B."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture_HWC, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture_HWC], step=trainer.global_step)


def _dataset(loaders: object) -> SourceImages:
    """Return the data set of a loader, or of the first of several loaders."""
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    return cast(_HasImages, loader).dataset


def _first(batch: Batch, count: int) -> Batch:
    """Return the first samples of a batch."""
    return cast(Batch, {key: cast(Sequence[object], value)[:count] for key, value in batch.items()})


def _csv(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
