"""Make the optimizer and the learning-rate schedule of a task from its configuration."""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import Literal, TypeVar

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable, ReduceLROnPlateau
from lightning.pytorch.utilities.types import LRSchedulerConfigType, OptimizerLRScheduler
from torch.optim import Optimizer

from visionattn.attention import optimizer_for
from visionattn.errors import UsageError

Built = TypeVar("Built")


def make_optimizers(
    task: L.LightningModule,
    optimizer: OptimizerCallable | None,
    lr_scheduler: LRSchedulerCallable | None,
    *,
    lr_interval: Literal["epoch", "step"],
    gamma_lr_factor: float,
) -> OptimizerLRScheduler:
    """Return the value of `configure_optimizers`; the arguments are as for `Task`.

    Raises:
        UsageError: the optimizer or the scheduler cannot be built; the training has no end, but the scheduler needs the
            number of steps; gradient clipping is combined with a fused optimizer in mixed precision, which the trainer
            refuses.
    """
    make = optimizer or partial(torch.optim.AdamW, lr=1e-3)
    made = _built("optimizer", lambda: optimizer_for(task, make, gamma_lr_factor=gamma_lr_factor))
    mixed = task.trainer.precision in ("16-mixed", "bf16-mixed")
    if mixed and task.trainer.gradient_clip_val and any(group.get("fused") for group in made.param_groups):
        raise UsageError(
            f"gradients of a fused optimizer cannot be clipped in {task.trainer.precision}; set fused: false in its "
            "init_args, or trainer.gradient_clip_val: null"
        )
    if lr_scheduler is None:
        return made
    settings = {name: parameter.default for name, parameter in inspect.signature(lr_scheduler).parameters.items()}
    settings |= getattr(lr_scheduler, "keywords", {})  # values from YAML, which the YAML parser binds by partial()
    schedule: LRSchedulerConfigType
    if "total_steps" in settings and settings["total_steps"] is None and settings.get("epochs") is None:
        steps = task.trainer.estimated_stepping_batches
        if math.isinf(steps):
            raise UsageError(
                "the lr_scheduler needs the number of steps, and this training has no end; set trainer.max_epochs or "
                "trainer.max_steps"
            )
        build = lambda: lr_scheduler(made, total_steps=int(steps))  # type: ignore[call-arg]  # noqa: E731  # checked above
        schedule = {"scheduler": _built("lr_scheduler", build), "interval": "step"}
    else:
        schedule = {"scheduler": _built("lr_scheduler", lambda: lr_scheduler(made)), "interval": lr_interval}
    step_size = getattr(schedule["scheduler"], "step_size", 1)
    if step_size < 1:  # StepLR would divide by it
        raise UsageError(f"step_size of the lr_scheduler must be ≥ 1, got {step_size}")
    if isinstance(schedule["scheduler"], ReduceLROnPlateau):
        schedule["monitor"] = schedule["scheduler"].monitor
    return {"optimizer": made, "lr_scheduler": schedule}


def check_schedules(trainer: L.Trainer) -> None:
    """Check that the learning-rate schedules are as long as the training.

    A schedule of fixed length, as OneCycleLR, has its length from the configuration, or from the checkpoint with which
    the training continues.

    Raises:
        UsageError: a schedule ends before the training.
    """
    for config in trainer.lr_scheduler_configs:
        length = getattr(config.scheduler, "total_steps", None)
        steps = trainer.estimated_stepping_batches if config.interval == "step" else trainer.max_epochs
        if length is not None and steps is not None and length < steps // config.frequency:
            unit = "steps" if config.interval == "step" else "epochs"
            source = ", which comes from the checkpoint," if trainer.ckpt_path else ""
            raise UsageError(
                f"the {type(config.scheduler).__name__}{source} ends after {length} {unit}, but this training has "
                f"{steps} {unit}; set trainer.max_epochs or trainer.max_steps so that both have the same length"
            )


def check_rates(optimizer: Optimizer, step: int) -> None:
    """Check the learning rates before a step of the optimizer.

    Raises:
        UsageError: a learning rate is negative, with which the loss would grow.
    """
    for group in optimizer.param_groups:
        if group["lr"] < 0:
            raise UsageError(
                f"the learning rate of step {step} is {float(group['lr']):g}; check the optimizer's lr and the options "
                "of the lr_scheduler, which must not be negative"
            )


def _built(part: str, build: Callable[[], Built]) -> Built:
    """Call a function that builds a part of the task's configuration, and shorten torch's error."""
    try:
        return build()
    except UsageError:
        raise
    except (ValueError, TypeError) as error:
        raise UsageError(f"model.init_args.{part} cannot be built: {error}") from error
