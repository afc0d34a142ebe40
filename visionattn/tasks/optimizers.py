"""Optimizer and schedule of a task, from what its config chose."""

import inspect
from functools import partial
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau

from visionattn.attention import optimizer_for
from visionattn.errors import UsageError


def optimizing(
    task: L.LightningModule,
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
    *,
    lr_interval: Literal["epoch", "step"],
    gamma_lr_factor: float,
) -> Any:
    """Make what `configure_optimizers` returns; the arguments are those of `Classification`.

    Raises:
        UsageError: the trainer would refuse it in its first step.
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
    asked = {name: parameter.default for name, parameter in inspect.signature(lr_scheduler).parameters.items()}
    asked |= getattr(lr_scheduler, "keywords", {})  # all that YAML's parser shows of what it made
    if "total_steps" in asked and asked["total_steps"] is None and asked.get("epochs") is None:
        steps = int(task.trainer.estimated_stepping_batches)
        schedule = {"scheduler": lr_scheduler(made, total_steps=steps), "interval": "step"}  # type: ignore[call-arg]
    else:
        schedule = {"scheduler": lr_scheduler(made), "interval": lr_interval}
    if isinstance(schedule["scheduler"], ReduceLROnPlateau):
        schedule["monitor"] = schedule["scheduler"].monitor
    return {"optimizer": made, "lr_scheduler": schedule}
