"""Exact resume: an interrupted and resumed training ends with the same weights, bit for bit.

A training step depends on the weights, the images and random numbers. (seed, epoch, index) determines the images, see
`data.loading.order`. `Resume` makes (seed, epoch, batch, process) determine the random numbers. So `last.ckpt` does not
need the state of a random generator.

`last.ckpt` is written before each validation, or at the end of an epoch without validation; every `every_n_steps` steps
or `every_n_minutes` minutes; and at a signal. If a training is resumed after the last step of an epoch, the rest of the
epoch is repeated with equal results: validation, choice of the best checkpoint, schedulers that depend on a metric,
early stopping.

Lightning saves and restores the counters of its loops. `Resume` corrects them in the checkpoint, and
`data.loading.batches` starts at the batch that they name.
"""

import random
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import TensorBoardLogger

from visionattn import signals
from visionattn.data import mix
from visionattn.training.callbacks.metrics_file import MetricsFile
from visionattn.training.callbacks.run_files import _continue_events, is_dev_run

NAME = "last.ckpt"
_TRAINING, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"
_UNFINISHED = "the rest of the epoch"


class Resume(Checkpoint):
    """Write `last.ckpt` for an exact resume, and seed the random generators before each step.

    With several processes, a signal to one process stops all processes after the same training step.

    Args:
        every_n_steps: number of optimizer steps between two writes of `last.ckpt`; None disables this interval.
        every_n_minutes: number of minutes between two writes of `last.ckpt`; None disables this interval.

    Raises:
        ValueError: a number is not positive.
    """

    def __init__(self, every_n_steps: int | None = None, every_n_minutes: float | None = 15.0) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be ≥ 1, got {every_n_steps}")
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ValueError(f"every_n_minutes must be > 0, got {every_n_minutes}")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.seed: int | None = None  # of the run; with None, the random generators are not seeded
        self.folder: str | None = None  # of the run
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._metrics: MetricsFile | None = None
        self._rows: int | None = None  # rows of metrics.csv at the time of the checkpoint from which a run is resumed
        # while a checkpoint is written: the loop with which a resumed run continues (None: as Lightning records it)
        self._next: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {} if self._metrics is None else {"rows": self._metrics.count}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._rows = state_dict["rows"]

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.install()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.install()  # again, since Lightning has installed handlers with which the exit code would be 0
        signals.hold()
        self._saved_at = time.monotonic()
        self._metrics = next((logger for logger in trainer.loggers if isinstance(logger, MetricsFile)), None)
        if self._metrics is not None and self._rows is not None:
            rows = self._metrics.continue_after(self._rows)
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
                    _continue_events(logger, max(0, trainer.global_step - 1), rows)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int
    ) -> None:
        # the previous step has logged all its values only now, so a checkpoint must not be written earlier;
        # a checkpoint does not contain accumulated gradients, so it is written only between optimizer steps
        if batch_idx % trainer.accumulate_grad_batches == 0:
            due = _any(trainer, self._is_due(trainer) or signals.received() is not None)
            if due and batch_idx:
                self._save(trainer, _TRAINING)
            if due:
                self._stop_if_signalled(trainer)
        self._seed_generators(trainer, batch_idx, 0)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer, _VALIDATION)
            self._stop_if_signalled(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._seed_generators(trainer, batch_idx, 1 + dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        number = signals.received()
        # processes may have different numbers of batches, so they cannot communicate here as in `_any`
        if trainer.state.fn == "fit" and number is not None:
            raise signals.Stopped(number)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # for epochs without a validation; max_steps or max_time can end the training in the middle of an epoch
        whole = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        self._save(trainer, None if whole else _UNFINISHED)
        self._stop_if_signalled(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        number = signals.received()
        signals.release()
        if number is not None:
            raise signals.Stopped(number)

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        signals.release()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._next is None:
            return
        loops = checkpoint["loops"]["fit_loop"]
        if self._next == _UNFINISHED:  # Lightning has counted the epoch as processed
            for count in loops["epoch_progress"].values():
                count["processed"] -= 1
        progress = loops[_TRAINING if self._next == _UNFINISHED else self._next]
        done = progress["total"]["processed"]
        if self._next != _VALIDATION:  # Lightning has counted the next batch as ready, but its step has not begun
            progress["total"]["ready"] = done
            progress["current"]["ready"] = progress["current"]["processed"]
        else:
            # Lightning would skip the validation after the last training batch. So record a stop in the first batch of
            # the validation, after which Lightning repeats the whole validation.
            progress["total"] |= {"ready": done + 1, "started": done + 1, "completed": done}
            progress["current"] = dict.fromkeys(progress["current"], 0)
        progress["is_last_batch"] = False

    def _seed_generators(self, trainer: L.Trainer, batch_idx: int, stage: int) -> None:
        if self.seed is not None:
            seed = mix(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank, stage)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # NumPy's global generator, which users' code may use
            torch.manual_seed(seed)

    def _is_due(self, trainer: L.Trainer) -> bool:
        by_steps = self.every_n_steps is not None and trainer.global_step % self.every_n_steps == 0
        minutes = (time.monotonic() - self._saved_at) / 60
        return by_steps or (self.every_n_minutes is not None and minutes >= self.every_n_minutes)

    def _save(self, trainer: L.Trainer, next_loop: str | None = None) -> None:
        if self._saved_step == trainer.global_step:
            return
        self._saved_at, self._saved_step, self._next = time.monotonic(), trainer.global_step, next_loop
        for logger in trainer.loggers:
            logger.save()  # the checkpoint has the number of rows, which must be in the file before
        try:
            if not is_dev_run(trainer):
                trainer.save_checkpoint(self._path(trainer))
        finally:
            self._next = None

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(self.folder or trainer.default_root_dir) / NAME

    def _stop_if_signalled(self, trainer: L.Trainer) -> None:
        if _any(trainer, signals.received() is not None):
            number = signals.received() or signals.TERMINATE
            if trainer.is_global_zero and not is_dev_run(trainer):
                print(f"stopped; to resume from {self._path(trainer)}, add --ckpt_path last", file=sys.stderr)
            raise signals.Stopped(number)


def _any(trainer: L.Trainer, own: bool) -> bool:
    """Return whether a condition holds in any process."""
    return trainer.strategy.reduce_boolean_decision(own, all=False) if trainer.world_size > 1 else own
