"""Options that several verbs share: the parser class, the options that name a model, and loading that model."""

import argparse
import dataclasses
import os
import sys
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
        help="name of a timm model, hf-hub:OWNER/NAME, torchvision:NAME[/WEIGHTS], hf:OWNER/NAME or hf:FOLDER of "
        "transformers, or MODULE:FUNCTION of your own, where the function returns the network; one of "
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
        help=f"weights file for --model, or {_RANDOM} for random weights (default: the pretrained weights of the name, "
        "or those that your function returns)",
    )
    parser.add_argument(
        "--new-head",
        action="store_true",
        help="load all of --weights but the head, the last layer (default: off)",
    )
    own = parser.add_argument_group("for --model, where the name does not say it or you want another")
    own.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="INT",
        help="side of the square input in pixels, or its height and width (default: the model's own, else 224)",
    )
    for name, default in (("mean", "0.485 0.456 0.406"), ("std", "0.229 0.224 0.225")):
        own.add_argument(
            f"--{name}",
            type=float,
            nargs="+",
            metavar="FLOAT",
            help=f"{name} of red, green and blue in [0, 1], or one number for grey (default: the model's own, else "
            f"ImageNet's, {default})",
        )
    own.add_argument(
        "--classes",
        metavar="FILE",
        help='text file with one class name a line, in the order of the outputs, or the names, as "a cat, a dog"; CLIP '
        "and SigLIP choose among these texts (default: the model's own names)",
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
        UsageError: there is no such model, or an option of `--model` is given with a checkpoint.
        DataError: the checkpoint or the weights cannot be used.
    """
    for flag, value in (("--weights", options.weights), ("--new-head", options.new_head)):
        if value and not options.model:
            raise UsageError(f"{flag} needs --model; a checkpoint has its own weights")
    if options.ckpt:
        return _load_checkpoint(options)
    return _load_named(options)


def _load_named(options: argparse.Namespace) -> LoadedModel:
    """Load the model that `--model` names; see `load`."""
    import torch

    from visionattn.models import check_size, load_model
    from visionattn.overlays import describe_model
    from visionattn.training import described_weights

    random = options.weights == _RANDOM
    torch.manual_seed(0)  # the same random weights in every run, so that a second run can keep the outputs of the first
    given = _given(options)
    described, names = (None, ()) if random or not options.weights else described_weights(options.weights)
    model = load_model(
        options.model,
        pretrained=not random,
        weights=None if random else options.weights,
        new_head=options.new_head,
        classes=_read_classes(options.classes) or names,
        preprocess=_changed(None, given) if len(given) == 3 else described,
    )
    preprocess = model.preprocess or describe_model(model.network)[1]
    known = preprocess is not None or len(given) == 3
    if preprocess is None or given:
        preprocess = _changed(preprocess, given)
        check_size(model.network, preprocess, options.model)
    if not known:
        height, width = preprocess.input_size
        print(
            f"the preprocessing of {options.model} is unknown; images are resized to {height} × {width} pixels and "
            f"normalised with mean {preprocess.mean} and std {preprocess.std}. Change this with --size, --mean and "
            "--std.",
            file=sys.stderr,
        )
    return model.network.to(_device()), preprocess, model.class_names


def _changed(preprocess: "Preprocess | None", given: dict[str, list[Any]]) -> "Preprocess":
    """Return a preprocessing with the values of `--size`, `--mean` and `--std`, where they are given."""
    from visionattn.data import Preprocess

    changes: dict[str, Any] = {name: tuple(values) for name, values in given.items()}
    if len(changes.get("size", ())) == 1:
        changes["size"] = changes["size"][0]
    try:
        return dataclasses.replace(preprocess or Preprocess(), **changes)
    except ValueError as error:
        raise UsageError(f"--size, --mean and --std: {error}") from error


def _read_classes(text: str | None) -> tuple[str, ...]:
    """Return the class names in a file, or the names themselves, separated by commas."""
    if text is None:
        return ()
    if "," in text and not os.path.exists(text):
        return tuple(name.strip() for name in text.split(",") if name.strip())
    try:
        with open(text, encoding="utf-8-sig") as file:
            return tuple(line.strip() for line in file if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise DataError(f"the class names in {printable(text)} cannot be read: {reason}") from error


def _load_checkpoint(options: argparse.Namespace) -> LoadedModel:
    """Load the network of a checkpoint; see `load`."""
    from visionattn.models import import_package
    from visionattn.training import load as load_task

    for package in options.trust or ():
        import_package(package)
    task = cast(LoadedTask, load_task(options.ckpt, trust=options.trust or ()))
    given = _given(options)
    for name, own in (*dict.fromkeys(given, task.preprocess).items(), ("classes", task.class_names)):
        if own and getattr(options, name) is not None:
            raise UsageError(f"--{name} needs --model; the checkpoint {options.ckpt} has its own")
    if task.preprocess is None and not given:
        raise DataError(
            f"the checkpoint {options.ckpt} has no preprocessing; give --size, --mean and --std, or train with data or "
            "a task that has a `preprocess`"
        )
    preprocess = task.preprocess or _changed(None, given)
    return task.network.to(_device()), preprocess, task.class_names or _read_classes(options.classes)


def _given(options: argparse.Namespace) -> dict[str, list[Any]]:
    """Return the values of `--size`, `--mean` and `--std` that are given."""
    return {name: getattr(options, name) for name in ("size", "mean", "std") if getattr(options, name) is not None}


def _device() -> str:
    import torch

    count = torch.cuda.device_count()
    local_rank = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))  # of torchrun, or of srun
    return f"cuda:{int(local_rank) % count}" if count else "cpu"


def method_and_layer(name: str | None) -> tuple[str | None, str | None]:
    """Split NAME[@LAYER] into (method, layer); an absent part is None."""
    method, _, layer = (name or "").partition("@")
    return method or None, layer or None
