"""A loss that is no number ends the training, or its step is skipped; and it is never the best."""

import math
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor

from visionattn.errors import DataError

_NAMED = 5  # files of a batch that a message names


class FiniteLoss(Callback):
    """Look at every training loss before it changes the weights.

    Args:
        otherwise: `stop` ends the training, and names the step and the files of its batch; `skip` leaves the weights,
            the optimizer and its moments as they are, and counts such steps as `train/skipped`.
    """

    def __init__(self, otherwise: Literal["stop", "skip"] = "stop") -> None:
        self.otherwise = otherwise
        self.skipped = 0
        self._batch: Any = None
        self._bad = False

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if bool(torch.isfinite(loss).all()):
            return
        self._bad = True
        if self.otherwise == "stop":
            terms = [f" ({name} {value})" for name, value in _terms(trainer).items() if not math.isfinite(value)]
            raise DataError(
                f"the loss of step {trainer.global_step} (epoch {trainer.current_epoch}, batch "
                f"{trainer.fit_loop.batch_idx}) is {float(loss.detach().sum())}{''.join(terms)}; "
                f"its images: {_files(self._batch)}; "
                "lower the learning rate, look at these images, or skip such steps: --finite_loss.otherwise skip"
            )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        bad, self._bad = self._bad, False
        if (
            self.otherwise == "skip" and trainer.world_size > 1
        ):  # gradients are shared, so what is bad here is bad there
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            self.skipped += 1
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # optimizers pass over parameters without one
            pl_module.log("train/skipped", float(self.skipped), on_step=True, on_epoch=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.otherwise == "stop" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            for name, value in _losses(trainer).items():
                if not math.isfinite(value):
                    raise DataError(f"{name} after step {trainer.global_step} is {value}; lower the learning rate")


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, to which what is no number is never the best, nor a figure beside such a loss."""

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        values = [*_losses(trainer).values(), *([] if current is None else [float(current)])]
        return all(map(math.isfinite, values)) and super().check_monitor_top_k(trainer, current)


def _losses(trainer: L.Trainer) -> dict[str, float]:
    """The losses of the validation."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/loss")}


def _terms(trainer: L.Trainer) -> dict[str, float]:
    """The terms of the training loss, where the task logs them apart."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/loss_")}


def _files(batch: Any) -> str:
    paths = batch.get("path", []) if isinstance(batch, dict) else []
    return ", ".join(map(str, paths[:_NAMED])) + (f" and {len(paths) - _NAMED} more" if len(paths) > _NAMED else "")
