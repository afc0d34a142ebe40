"""Make the optimizer and the learning-rate schedule of a task from its configuration."""

import inspect
from functools import partial
from typing import Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler

from visionattn.attention import optimizer_for
from visionattn.errors import UsageError


def make_optimizers(
    task: L.LightningModule,
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
    *,
    lr_interval: Literal["epoch", "step"],
    gamma_lr_factor: float,
) -> OptimizerLRScheduler:
    """Return the value of `configure_optimizers`; the arguments are those of `Task`.

    Raises:
        UsageError: gradient clipping is combined with a fused optimizer in mixed precision, which the trainer refuses.
    """
    made = optimizer_for(task, optimizer or partial(torch.optim.AdamW, lr=1e-3), gamma_lr_factor=gamma_lr_factor)
    mixed = task.trainer.precision in ("16-mixed", "bf16-mixed")
    if mixed and task.trainer.gradient_clip_val and any(group.get("fused") for group in made.param_groups):
        raise UsageError(
            f"gradients of a fused optimizer cannot be clipped in {task.trainer.precision}; set fused: false in its "
            "init_args, or trainer.gradient_clip_val: null"
        )
    if lr_scheduler is None:
        return made
    settings = {name: parameter.default for name, parameter in inspect.signature(lr_scheduler).parameters.items()}
    settings |= getattr(lr_scheduler, "keywords", {})  # the YAML parser's partial hides its values from the signature
    schedule: LRSchedulerConfigType
    if "total_steps" in settings and settings["total_steps"] is None and settings.get("epochs") is None:
        steps = int(task.trainer.estimated_stepping_batches)
        scheduler = lr_scheduler(made, total_steps=steps)  # type: ignore[call-arg]  # checked above
        schedule = {"scheduler": scheduler, "interval": "step"}
    else:
        schedule = {"scheduler": lr_scheduler(made), "interval": lr_interval}
    if isinstance(schedule["scheduler"], ReduceLROnPlateau):
        schedule["monitor"] = schedule["scheduler"].monitor
    return {"optimizer": made, "lr_scheduler": schedule}
