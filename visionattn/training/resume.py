"""Trainings that end at any moment and go on as if they had not.

What a step does is a function of its weights, its images and its random numbers. The images come from (seed, epoch,
index), see `data.order`; here the random numbers come from (seed, epoch, batch, process). So `last.ckpt` needs no state
of any generator, and a training that is continued from it ends with the same weights, bit for bit.

`last.ckpt` is written before each validation (at the end of an epoch that has none), every so many steps or minutes,
and at a signal. All that follows the training steps of an epoch (validation, the choice of the best, schedulers that
watch a figure, early stopping) is done anew by the continued training, and comes out the same.
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

from visionattn import signals
from visionattn.data.loading.order import mix
from visionattn.training.callbacks.metrics_file import MetricsFile

NAME = "last.ckpt"
_TRAINING, _VALIDATION = "epoch_loop.batch_progress", "epoch_loop.val_loop.batch_progress"


class Resume(Checkpoint):
    """Keep `last.ckpt` such that the training can go on from it exactly, and draw each step's random numbers anew.

    With several processes, a signal to any of them stops all after the same training step.

    Args:
        every_n_steps: write it after so many optimizer steps; None is never.
        every_n_minutes: write it after so many minutes; None is never.
    """

    def __init__(self, every_n_steps: int | None = None, every_n_minutes: float | None = 15.0) -> None:
        super().__init__()
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"every_n_steps must be ≥ 1, got {every_n_steps}")
        if every_n_minutes is not None and every_n_minutes <= 0:
            raise ValueError(f"every_n_minutes must be > 0, got {every_n_minutes}")
        self.every_n_steps = every_n_steps
        self.every_n_minutes = every_n_minutes
        self.seed: int | None = None  # of the run; None draws without one
        self.folder: str | None = None  # of the run
        self._saved_at = time.monotonic()
        self._saved_step = -1
        self._next: str | None = None  # where the loops stand while it is written, other than Lightning takes them to

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.install()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        signals.install()  # Lightning has taken them, and would exit with 0
        signals.hold()
        self._saved_at = time.monotonic()
        for logger in trainer.loggers:
            if isinstance(logger, MetricsFile):
                logger.continue_at(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        # only here has all been noted that the step before logged; and between the batches of one optimizer step there
        # are gradients that no checkpoint holds
        if batch_idx % trainer.accumulate_grad_batches == 0:
            due = _any(trainer, self._is_due(trainer) or signals.received() is not None)
            if due and batch_idx:
                self._save(trainer, _TRAINING)
            if due:
                self._stop_if_told(trainer)
        self._draw_anew(trainer, batch_idx, 0)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._save(trainer, _VALIDATION)
            self._stop_if_told(trainer)

    def on_validation_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._draw_anew(trainer, batch_idx, 1 + dataloader_idx)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        number = signals.received()
        if trainer.state.fn == "fit" and number is not None:  # no vote: processes may have different numbers of batches
            raise signals.Stopped(number)

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._save(trainer)  # where no validation did
        self._stop_if_told(trainer)

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
        progress = checkpoint["loops"]["fit_loop"][self._next]
        done = progress["total"]["processed"]
        if self._next == _TRAINING:  # the batch that was fetched is not begun
            progress["total"]["ready"] = done
            progress["current"]["ready"] = progress["current"]["processed"]
        else:
            # Lightning takes a checkpoint that has done all batches for one that has been validated; one that stopped
            # in the first batch of a validation it validates from the beginning
            progress["total"] |= {"ready": done + 1, "started": done + 1, "completed": done}
            progress["current"] = dict.fromkeys(progress["current"], 0)
        progress["is_last_batch"] = False

    def _draw_anew(self, trainer: L.Trainer, batch_idx: int, stage: int) -> None:
        if self.seed is not None:
            seed = mix(self.seed, trainer.current_epoch, batch_idx, trainer.global_rank, stage)
            random.seed(seed)
            np.random.seed(seed % 2**32)  # whoever draws from the global generators shall be resumable too
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
            logger.save()  # first: what is logged again is known by its step, what is lost is lost
        try:
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                trainer.save_checkpoint(self._path(trainer))
        finally:
            self._next = None

    def _path(self, trainer: L.Trainer) -> Path:
        return Path(self.folder or trainer.default_root_dir) / NAME

    def _stop_if_told(self, trainer: L.Trainer) -> None:
        if _any(trainer, signals.received() is not None):
            number = signals.received() or signals.TERMINATE
            if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
                print(f"stopped; {self._path(trainer)} goes on with --ckpt_path last", file=sys.stderr)
            raise signals.Stopped(number)


def _any(trainer: L.Trainer, here: bool) -> bool:
    """Whether it is so in any process."""
    return trainer.strategy.reduce_boolean_decision(here, all=False) if trainer.world_size > 1 else here
