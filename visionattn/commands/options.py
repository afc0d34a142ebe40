"""Options that several verbs share: the parser class, the options that name a model, and loading that model."""

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, TypeAlias, cast

from visionattn.errors import DataError, UsageError, nearest

if TYPE_CHECKING:
    from typing import NoReturn

    from torch import nn

    from visionattn.data import Preprocess

_RANDOM = "random"  # value of --weights for random weights


class LoadedTask(Protocol):
    """The part of a task from a checkpoint that the verbs use."""

    network: "nn.Module"
    preprocess: "Preprocess | None"
    class_names: Sequence[str]


LoadedModel: TypeAlias = "tuple[nn.Module, Preprocess, Sequence[str]]"
"""A network, its preprocessing, and the class names of its outputs."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError. For an unknown option, the message names the nearest one."""

    def error(self, message: str) -> "NoReturn":
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0]
            message = f"{self.prog} has no option {flag}.{nearest(flag, self._option_string_actions)}"
        raise UsageError(message)


def add_model(parser: argparse.ArgumentParser, *, compare: bool = False) -> None:
    """Add the options that name the model: `--ckpt` or `--model`, and `--weights`.

    Args:
        parser: parser of the verb.
        compare: also add `--compare`, which names two checkpoints.
    """
    alternatives = "--ckpt, --model or --compare" if compare else "--ckpt or --model"
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--ckpt",
        metavar="FILE",
        help=f"checkpoint written by visionattn fit, or hf://OWNER/NAME; one of {alternatives} (required)",
    )
    source.add_argument("--model", metavar="TIMM_NAME", help=f"name of a timm model; one of {alternatives} (required)")
    if compare:
        source.add_argument(
            "--compare",
            nargs=2,
            metavar="FILE",
            help="two checkpoints; shows where the second model attends more or less than the first; "
            f"one of {alternatives} (required)",
        )
    parser.add_argument(
        "--weights",
        metavar="FILE",
        help=f"weights file for --model, or {_RANDOM} for random weights (default: timm's pretrained weights)",
    )


def load(options: argparse.Namespace) -> LoadedModel:
    """Load the model that the options of `add_model` name. It is on the GPU if there is one.

    Returns:
        The network in evaluation mode, its preprocessing, and the class names of its outputs: empty if unknown.

    Raises:
        UsageError: timm has no such model, or `--weights` is given with a checkpoint.
        DataError: the checkpoint or the weights cannot be used.
    """
    if options.weights and not options.model:
        raise UsageError("--weights goes with --model; a checkpoint holds its own weights")
    if options.ckpt:
        return _load_checkpoint(options.ckpt)
    import torch

    from visionattn.models import class_names_of, create_backbone, preprocess_of

    random = options.weights == _RANDOM
    torch.manual_seed(0)  # the same random weights in every run, so that a second run can keep the outputs of the first
    model = create_backbone(
        options.model, pretrained=not options.weights, weights=None if random else options.weights
    ).eval()
    return model.to(_device()), preprocess_of(model), () if random else class_names_of(model)


def _load_checkpoint(path: str) -> LoadedModel:
    """Load the network of a checkpoint. It is on the GPU if there is one; see `load`."""
    from visionattn.training import load as load_task

    task = cast(LoadedTask, load_task(path))
    if task.preprocess is None:
        raise DataError(f"{path} does not say how its images are prepared; train with data that has a preprocess")
    return task.network.to(_device()), task.preprocess, task.class_names


def _device() -> str:
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(os.environ.get('LOCAL_RANK', 0)) % count}" if count else "cpu"


def method_and_layer(name: str | None) -> tuple[str | None, str | None]:
    """Split NAME[@LAYER] into (method, layer); an absent part is None."""
    method, _, layer = (name or "").partition("@")
    return method or None, layer or None
