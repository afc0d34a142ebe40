"""Helpers that the callbacks share: the run's folder, its loggers, its data, and CSV files."""

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import Tensor, nn

from visionattn.data import Batch


class SourceImages(Protocol):
    """A data set that can read the source image of a sample."""

    def read_source(self, path: str, /) -> NDArray[np.uint8]: ...


class _HasImages(Protocol):
    dataset: SourceImages


def is_dev_run(trainer: L.Trainer) -> bool:
    """Return whether the run is a `fast_dev_run`, which writes no files."""
    return bool(getattr(trainer, "fast_dev_run", False))


def datamodule_of(trainer: L.Trainer) -> object:
    """Return the data module of a trainer, or None if there is none."""
    return getattr(trainer, "datamodule", None)


def network_of(pl_module: L.LightningModule) -> nn.Module:
    """Return the network of a task; a module without a `network` is itself the network."""
    network = getattr(pl_module, "network", None)
    return network if isinstance(network, nn.Module) else pl_module


def images_of(pl_module: L.LightningModule, batch: Batch) -> Tensor:
    """Return a batch's images in the number format of the task's network, which `trainer.precision` may have changed.

    Inside the trainer's steps, Lightning converts the images itself.
    """
    kinds = (tensor.dtype for tensor in network_of(pl_module).parameters() if tensor.is_floating_point())
    return batch["image"].to(next(kinds, torch.float32))


def class_names_of(owner: object) -> Sequence[str]:
    """Return the class names of a task or data module; empty if there are none."""
    names: Sequence[str] = getattr(owner, "class_names", ())
    return names


def _folder(trainer: L.Trainer) -> Path | None:
    """Return the folder of a run's overlays, or None for a run that writes no files."""
    if is_dev_run(trainer) or trainer.log_dir is None:
        return None
    return Path(trainer.log_dir) / "overlays"


def _show(trainer: L.Trainer, name: str, picture_HWC: NDArray[np.uint8]) -> None:
    """Send a picture to the loggers that accept pictures: TensorBoard and W&B."""
    step = max(0, trainer.global_step - 1)  # Lightning logs the metrics of a validation with the step before it
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture_HWC, step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture_HWC], step=step)


def _continue_events(logger: TensorBoardLogger, step: int, rows: Sequence[Mapping[str, str]]) -> None:
    """Hide the events that earlier processes logged at this step or later, and log the metrics of this step again.

    Args:
        logger: of the resumed run.
        step: the last step before the resume.
        rows: the rows of metrics.csv from before the resume.
    """
    # TensorBoard drops the events before a start that have the step of this start, or a later step
    start = SessionLog(status=SessionLog.START)
    logger.experiment.file_writer.add_event(Event(step=step, session_log=start))
    for row in rows:
        if row.get("step") == str(step):
            metrics = {name: float(value) for name, value in row.items() if name != "step"}
            logger.log_metrics(metrics, step)


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
