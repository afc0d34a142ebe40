"""Show the progress of a run: on a terminal as a bar, and in a file as lines."""

import time
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

_PAUSE = 0.5  # seconds between two updates of the bar; each update waits for the metrics, which may be on a GPU


class RunProgress(ProgressBar):
    """Show how far a run is, its metrics, and an estimate of the time that is left for the whole run.

    On a terminal, this is a bar over all epochs. If stderr is redirected into a file, a line is written at the end of
    each epoch, and in between every `line_seconds`.

    Args:
        line_seconds: seconds between two lines within an epoch.
    """

    def __init__(self, line_seconds: float = 60.0) -> None:
        super().__init__()
        self.line_seconds = line_seconds
        self._console = Console(stderr=True)
        self._enabled = True
        self._bar: Progress | None = None  # only on a terminal
        self._total = float("inf")
        self._first = 0  # step with which this process began
        self._started = self._shown = 0.0

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(_epoch(trainer), trainer.estimated_stepping_batches, trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: object, batch_idx: int
    ) -> None:
        self._show(trainer, pl_module, trainer.global_step, _epoch(trainer))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._show(trainer, pl_module, trainer.global_step, _epoch(trainer), at_once=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._begin("validation", _sum(trainer.num_val_batches))

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if trainer.state.fn == "validate":
            self._show(trainer, pl_module, batch_idx + 1, "validation")
        elif not trainer.sanity_checking:
            part = f"{_epoch(trainer)}, validation {batch_idx + 1}/{_sum(trainer.num_val_batches)}"
            self._show(trainer, pl_module, trainer.global_step, part)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._end()

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("test", _sum(trainer.num_test_batches))

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._show(trainer, pl_module, batch_idx + 1, "test")

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()  # before the report is printed

    def on_predict_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin("predict", _sum(trainer.num_predict_batches))

    def on_predict_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._show(trainer, pl_module, batch_idx + 1, "predict")

    def on_predict_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._end()

    def _begin(self, part: str, total: float, first: int = 0) -> None:
        self._end()
        self._total, self._first = total, first
        self._started = self._shown = time.monotonic()
        if self._enabled and self._console.is_terminal:
            columns = (
                TextColumn("  {task.description}", markup=False),
                BarColumn(20),
                TextColumn("{task.fields[state]}"),
            )
            self._bar = Progress(*columns, console=self._console)
            self._bar.add_task(part, total=total if total < float("inf") else None, state="")
            self._bar.start()

    def _end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _show(
        self, trainer: L.Trainer, pl_module: L.LightningModule, done: int, part: str, *, at_once: bool = False
    ) -> None:
        """Show that `done` steps of the run are done.

        Args:
            trainer: of the run.
            pl_module: the task.
            done: number of steps, including those of earlier processes.
            part: name of the part of the run.
            at_once: do not wait until the next update is due.
        """
        now = time.monotonic()
        pause = _PAUSE if self._bar is not None else self.line_seconds
        if not self._enabled or not (at_once or now - self._shown >= pause):
            return
        self._shown = now
        state = [f"{done:,}/{self._total:,} steps" if self._total < float("inf") else f"{done:,} steps"]
        for name, value in self.get_metrics(trainer, pl_module).items():
            if isinstance(value, float):
                state.append(f"{name} {value:.3g}")
        if self._first < done < self._total < float("inf"):
            seconds = (now - self._started) / (done - self._first) * (self._total - done)
            state.append(f"{_duration(seconds)} left")
        if self._bar is None:
            self._console.print(", ".join([part, *state]), soft_wrap=True, markup=False, highlight=False)
        else:
            self._bar.update(self._bar.task_ids[0], completed=done, description=part, state="  ".join(state))


def _epoch(trainer: L.Trainer) -> str:
    last = trainer.max_epochs
    return f"epoch {trainer.current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")


def _sum(counts: Any) -> int | float:  # Lightning's type of a number of batches: a number, or a list of numbers
    return sum(counts) if isinstance(counts, list) else counts


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
