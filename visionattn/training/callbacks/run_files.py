"""What the callbacks share: the run's folder, its loggers, and CSV files."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger, WandbLogger
from numpy.typing import NDArray


def _folder(trainer: L.Trainer) -> Path | None:
    """Where a run keeps its overlays; None for runs that leave nothing behind."""
    if trainer.fast_dev_run or trainer.log_dir is None:  # type: ignore[attr-defined]
        return None
    return Path(trainer.log_dir) / "overlays"


def _show(trainer: L.Trainer, name: str, picture_HWC: NDArray[np.uint8]) -> None:
    """Give a picture to the loggers that take any: TensorBoard and W&B."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, picture_HWC, trainer.global_step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [picture_HWC], step=trainer.global_step)


def _dataset(loaders: Any) -> Any:
    loader = loaders[0] if isinstance(loaders, (list, tuple)) else loaders
    return loader.dataset


def _first(batch: dict[str, Any], count: int) -> dict[str, Any]:
    return {key: value[:count] for key, value in batch.items()}


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text).writerows(rows)
    return text.getvalue().encode("utf-8", "surrogateescape")
