"""Stop the training at a NaN or infinite loss, or skip the step; such a loss never gives the best checkpoint."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import Tensor, nn
from torch.optim import Optimizer

from visionattn.errors import DataError

_MAX_FILES = 5  # maximum number of files that a message lists


class NaNGuard(Callback):
    """Check that every training loss is finite before it changes the weights.

    Args:
        on_nan: `stop` ends the training with an error that names the step and the files of its batch. `skip` leaves the
            weights, the optimizer's state and the model's buffers (BatchNorm's running statistics) unchanged, and logs
            the number of skipped steps as `train/skipped`.
    """

    def __init__(self, on_nan: Literal["stop", "skip"] = "stop") -> None:
        self.on_nan = on_nan
        self.skipped = 0
        self._batch: object = None
        self._bad = False  # a batch since the last optimizer step has a loss that is not finite
        self._bad_batch = False
        self._buffers: dict[str, Tensor] = {}  # copies from before the batch

    def state_dict(self) -> dict[str, Any]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch
        if self.on_nan == "skip":
            self._buffers = {name: buffer.detach().clone() for name, buffer in pl_module.named_buffers()}

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if bool(torch.isfinite(loss).all()):
            return
        self._bad = self._bad_batch = True
        if self.on_nan == "stop":
            terms = [f" ({name} {value})" for name, value in _terms(trainer).items() if not math.isfinite(value)]
            raise DataError(
                f"the loss of step {trainer.global_step} (epoch {trainer.current_epoch}, batch "
                f"{trainer.fit_loop.batch_idx}) is {float(loss.detach().sum())}{''.join(terms)}; "
                f"its images: {_files(self._batch)}; "
                "lower the learning rate, check these images, or skip such steps: --nan_guard.on_nan skip"
            )

    def on_after_backward(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # only now, since with gradient checkpointing the backward pass changes buffers too
        if self._bad_batch:
            _restore(pl_module, self._buffers)
            self._bad_batch = False

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        bad, self._bad = self._bad, False
        if self.on_nan == "skip" and trainer.world_size > 1:
            # all processes skip the step, since a NaN loss in one process makes the averaged gradients NaN
            bad = trainer.strategy.reduce_boolean_decision(bad, all=False)
        if bad:
            self.skipped += 1
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    parameter.grad = None  # optimizers skip parameters without a gradient
            pl_module.log("train/skipped", float(self.skipped), on_step=True, on_epoch=False)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch, self._buffers = None, {}

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.on_nan == "stop" and trainer.state.fn == "fit" and not trainer.sanity_checking:
            for name, value in _losses(trainer).items():
                if not math.isfinite(value):
                    raise DataError(f"{name} after step {trainer.global_step} is {value}; lower the learning rate")


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint, but skip checkpoints whose monitored value or validation loss is not finite."""

    def check_monitor_top_k(self, trainer: L.Trainer, current: Tensor | None = None) -> bool:
        values = [*_losses(trainer).values(), *([] if current is None else [float(current)])]
        return all(map(math.isfinite, values)) and super().check_monitor_top_k(trainer, current)


def _restore(module: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Copy values into a module's buffers; leave buffers that are new or have changed their shape."""
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in buffers and buffers[name].shape == buffer.shape:
                buffer.copy_(buffers[name])


def _losses(trainer: L.Trainer) -> dict[str, float]:
    """Return the losses of the validation."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/loss")}


def _terms(trainer: L.Trainer) -> dict[str, float]:
    """Return the terms of the training loss, which some tasks log separately."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("train/loss_")}


def _files(batch: object) -> str:
    paths = batch.get("path", []) if isinstance(batch, dict) else []
    return ", ".join(map(str, paths[:_MAX_FILES])) + (
        f" and {len(paths) - _MAX_FILES} more" if len(paths) > _MAX_FILES else ""
    )
