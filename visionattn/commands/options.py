"""Options that several verbs share: the parser class, the options that name a model, and loading that model."""

import argparse
import dataclasses
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, cast

from visionattn.errors import DataError, UsageError, nearest
from visionattn.files import local_path, printable

if TYPE_CHECKING:
    from typing import NoReturn

    from torch import nn

    from visionattn.data import Preprocess

_RANDOM = "random"  # value of --weights for random weights


class LoadedTask(Protocol):
    """The attributes of a loaded task that the verbs use."""

    network: "nn.Module"
    preprocess: "Preprocess | None"
    class_names: Sequence[str]


LoadedModel: TypeAlias = "tuple[nn.Module, Preprocess, Sequence[str]]"
"""A network, its preprocessing, and the class names of its outputs."""


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that raises UsageError. For an unknown option, the message names the nearest one.

    Options whose metavar is PATH, DIR or FILE take no address such as s3://bucket/out. Those that name a checkpoint
    take hf://OWNER/NAME.
    """

    def parse_known_args(self, *args: Any, **kwargs: Any) -> "tuple[Any, list[str]]":  # types as in argparse
        """Parse the arguments, and refuse addresses."""
        options, others = super().parse_known_args(*args, **kwargs)
        for action in self._actions:
            value = getattr(options, action.dest, None) if action.metavar in ("PATH", "DIR", "FILE") else None
            for path in value if isinstance(value, list) else [value]:
                on_hub = action.dest in ("ckpt", "compare") and str(path).startswith("hf://")
                if isinstance(path, str) and not on_hub:
                    local_path(path, (action.option_strings or [action.dest])[0])
        return options, others

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
    source.add_argument(
        "--model",
        metavar="NAME",
        help="name of a timm model, or MODULE:FUNCTION of your own, where the function returns the network; one of "
        f"{alternatives} (required)",
    )
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
        help=f"weights file for --model, or {_RANDOM} for random weights (default: timm's pretrained weights, or those "
        "that your function returns)",
    )
    own = parser.add_argument_group("for --model MODULE:FUNCTION")
    own.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="INT",
        help="side of the square input in pixels, or its height and width (default: as the network says, else 224)",
    )
    for name, default in (("mean", "0.485 0.456 0.406"), ("std", "0.229 0.224 0.225")):
        own.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="FLOAT",
            help=f"{name} of red, green and blue in [0, 1], or one number for grey (default: ImageNet's, {default})",
        )
    own.add_argument(
        "--classes",
        metavar="FILE",
        help="text file with one class name a line, in the order of the outputs (default: none)",
    )
    parser.add_argument(
        "--trust",
        action="append",
        metavar="PACKAGE",
        help="Python package of yours whose classes --ckpt may name; may be given more than once (default: none)",
    )


def load(options: argparse.Namespace) -> LoadedModel:
    """Load the model that the options of `add_model` name, onto the GPU if there is one.

    Returns:
        The network in evaluation mode, its preprocessing, and the class names of its outputs (empty if unknown).

    Raises:
        UsageError: timm has no such model, or `--weights` is given with a checkpoint.
        DataError: the checkpoint or the weights cannot be used.
    """
    if options.weights and not options.model:
        raise UsageError("--weights needs --model; a checkpoint has its own weights")
    if options.ckpt:
        return _load_checkpoint(options.ckpt, options.trust or ())
    if ":" in options.model:
        return _load_user_model(options)
    for name in ("size", "mean", "std", "classes"):
        if getattr(options, name) is not None:
            raise UsageError(f"--{name} is for --model MODULE:FUNCTION; timm's models have their own")
    import torch

    from visionattn.models import class_names_of, create_backbone, preprocess_of

    random = options.weights == _RANDOM
    torch.manual_seed(0)  # the same random weights in every run, so that a second run can keep the outputs of the first
    model = create_backbone(
        options.model, pretrained=not options.weights, weights=None if random else options.weights
    ).eval()
    return model.to(_device()), preprocess_of(model), () if random else class_names_of(model)


def _load_user_model(options: argparse.Namespace) -> LoadedModel:
    """Load the network that a function of the user's module returns; see `load`."""
    import torch

    from visionattn.data import Preprocess
    from visionattn.models import create_user_model
    from visionattn.overlays import describe_model

    torch.manual_seed(0)  # as for timm's random weights
    model = create_user_model(options.model, None if options.weights in (None, _RANDOM) else options.weights)
    _, preprocess, _ = describe_model(model)
    known = preprocess or Preprocess()
    size = known.size if options.size is None else options.size[0] if len(options.size) == 1 else tuple(options.size)
    mean, std = (tuple(given or own) for given, own in ((options.mean, known.mean), (options.std, known.std)))
    try:
        preprocess = dataclasses.replace(known, size=size, mean=mean, std=std)
    except ValueError as error:
        raise UsageError(f"--size, --mean and --std: {error}") from error
    return model.to(_device()), preprocess, _read_classes(options.classes)


def _read_classes(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        with open(path, encoding="utf-8-sig") as file:
            return tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DataError(f"the class names in {printable(path)} cannot be read: {reason}") from error


def _load_checkpoint(path: str, trust: Sequence[str]) -> LoadedModel:
    """Load the network of a checkpoint; see `load`."""
    from visionattn.models import import_package
    from visionattn.training import load as load_task

    for package in trust:
        import_package(package)
    task = cast(LoadedTask, load_task(path, trust=trust))
    if task.preprocess is None:
        raise DataError(f"the checkpoint {path} has no preprocessing; train with data that has a `preprocess`")
    return task.network.to(_device()), task.preprocess, task.class_names


def _device() -> str:
    import torch

    count = torch.cuda.device_count()
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # of torchrun, or of srun
    return f"cuda:{int(local_rank) % count}" if count else "cpu"


def method_and_layer(name: str | None) -> tuple[str | None, str | None]:
    """Split NAME[@LAYER] into (method, layer); an absent part is None."""
    method, _, layer = (name or "").partition("@")
    return method or None, layer or None
