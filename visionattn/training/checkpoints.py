"""Checkpoints that describe themselves and are read without running code from them.

A checkpoint of visionattn is Lightning's with one more entry, `visionattn`: plain data with the task's configuration,
the preprocessing and the class names. A checkpoint from someone else may name any class there, so only classes of the
packages in `TRUSTED` are built from it. To send a checkpoint to others, export it: a .safetensors file holds the
weights and that entry, and its format cannot hold code.
"""

import dataclasses
import importlib
import inspect
import json
import os
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final, TypedDict, cast

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from visionattn.data import Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.files import write_file
from visionattn.training.hub import PREFIX, fetch

TRUSTED = ("visionattn", "torch.nn", "torch.optim", "torchvision", "timm")
"""Packages whose modules, optimizers and schedulers may be built because a checkpoint names them."""

ENTRY: Final = "visionattn"
"""Key of a checkpoint's description."""

_TOKENS = "model.init_args.network.init_args.tokens."
_BUILT_FROM_CHECKPOINTS = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


class Description(TypedDict):
    """The entry `visionattn` of a checkpoint.

    Keys:
        model: the `model` section of the configuration: `class_path` and `init_args`, plain data.
        class_names: of the network's outputs.
        preprocess: fields of a `Preprocess`; None if unknown.
    """

    model: Mapping[str, Any]
    class_names: list[str]
    preprocess: Mapping[str, Any] | None


class CheckpointContent(TypedDict, total=False):
    """The entries of a checkpoint that visionattn uses."""

    state_dict: dict[str, torch.Tensor]
    visionattn: Description
    hyper_parameters: object


class DescribeCheckpoint(Callback):
    """Write into every checkpoint the description that `load` needs.

    Args:
        model: the `model` section of the configuration: `class_path` and `init_args`, plain data.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        preprocess = getattr(getattr(trainer, "datamodule", None), "preprocess", None)
        checkpoint[ENTRY] = {
            "model": self.model,
            "class_names": list(getattr(pl_module, "class_names", ())),
            "preprocess": dataclasses.asdict(preprocess) if preprocess else None,
        }


def load(path: str | os.PathLike[str], *, trust: Sequence[str] = ()) -> L.LightningModule:
    """Load the task of a checkpoint with its weights.

    Args:
        path: a .ckpt written by `visionattn fit`, a .safetensors written by `visionattn export`, or a model on the
            Hugging Face hub, `hf://owner/name`.
        trust: names of your own packages whose classes the checkpoint may use, in addition to `TRUSTED`.

    Returns:
        The task in evaluation mode, on the CPU. Its `network` is the model, `class_names` the names of its outputs, and
        `preprocess` prepares images for it.

    Raises:
        UsageError: the name on the hub is malformed.
        DataError: the file is missing, cut short or another kind of file, would run code, uses a class outside of the
            trusted packages, or was not written by visionattn.
    """
    content = read(path)
    entry = content[ENTRY]
    model = entry["model"]
    args = {**model.get("init_args", {}), "optimizer": None, "lr_scheduler": None}
    task = _build({**model, "init_args": args}, path, (*TRUSTED, *trust))
    if not isinstance(task, L.LightningModule):
        raise DataError(f"{os.fspath(path)} describes a {type(task).__name__}, which is not a LightningModule")
    try:
        task.load_state_dict(content["state_dict"], strict=True)
    except RuntimeError as error:
        raise DataError(f"the weights in {os.fspath(path)} do not fit the model it describes: {error}") from error
    vars(task)["class_names"] = tuple(entry["class_names"])  # a LightningModule has no such fields of its own
    vars(task)["preprocess"] = _preprocess(entry["preprocess"])
    return task.eval()


def _preprocess(entry: Mapping[str, Any] | None) -> Preprocess | None:
    if not entry:
        return None
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    return Preprocess(**options)  # JSON has turned tuples into lists


def export(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write a checkpoint as a .safetensors file, to send to others; `load` reads it too.

    Args:
        path: as `load` takes it.
        out: the file to write.

    Raises:
        DataError: as `load`, or `out` cannot be written.
    """
    from safetensors.torch import save

    content = read(path)
    # the format has no shared tensors, so each of several tied weights is written separately
    state = {name: value.detach().clone().contiguous() for name, value in content["state_dict"].items()}
    write_file(out, save(state, metadata={"format": "pt", ENTRY: json.dumps(content[ENTRY])}))


def read(path: str | os.PathLike[str]) -> CheckpointContent:
    """Read a checkpoint of visionattn as tensors and plain data, without running code from it.

    Raises:
        DataError: as `load`.
    """
    name = os.fspath(path)
    if name.startswith(PREFIX):
        path = name = fetch(name)
    if not os.path.isfile(path):
        raise DataError(f"there is no checkpoint {name}")
    try:
        content = _read_safetensors(path) if name.endswith(".safetensors") else _read_archive(path)
    except DataError:
        raise
    except Exception as error:  # torch and zipfile raise many kinds
        reason = (
            "it would run code" if "weights_only" in str(error).lower() else "it is cut short or another kind of file"
        )
        raise DataError(f"{name} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(content, dict) or "state_dict" not in content or not isinstance(content.get(ENTRY), dict):
        raise DataError(
            f"{name} was not written by visionattn; plain weights can be used as the network's `weights` instead"
        )
    return cast(CheckpointContent, content)


def _read_archive(path: str | os.PathLike[str]) -> object:
    with zipfile.ZipFile(path) as archive:  # torch's older formats consist of pickles; Lightning never wrote them
        # torch does not compress its records, so an archive that unpacks to more was made to exhaust the memory
        if sum(record.file_size for record in archive.infolist()) > os.path.getsize(path):
            raise DataError(f"{os.fspath(path)} cannot be read as a checkpoint: it unpacks to more bytes than it has")
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, object]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        entry = (file.metadata() or {}).get(ENTRY)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open returns no dict
    return {"state_dict": state, **({} if entry is None else {ENTRY: json.loads(entry)})}


def check_against(path: str | os.PathLike[str], model: Mapping[str, Any], *, training: bool = True) -> None:
    """Check that the model of a configuration equals the model of a checkpoint.

    Lightning would silently prefer one of the two: the checkpoint for hyper-parameters, the configuration for the
    network.

    Args:
        path: of the checkpoint.
        model: the `model` section of the configuration.
        training: whether the run continues the training. If not, the network's `tokens`, which have no weights, may
            differ: a network trained with all tokens can be tested with fewer.

    Raises:
        UsageError: the models differ; the message names every difference.
        DataError: as `read`.
    """
    content = read(path)
    if content.get("hyper_parameters"):
        raise DataError(f"{os.fspath(path)} holds hyper-parameters that would replace yours; visionattn writes none")
    saved = content[ENTRY]["model"]
    if saved.get("class_path") != model.get("class_path"):
        raise DataError(
            f"{os.fspath(path)} is a checkpoint of {saved.get('class_path')}, "
            f"and the config asks for {model.get('class_path')}"
        )
    ours, theirs = (
        {key: value for key, value in _leaves(tree) if training or not f"{key}.".startswith(_TOKENS)}
        for tree in (model, saved)
    )
    differences = [
        f"{key} is {_show(ours.get(key))} here and {_show(theirs.get(key))} in it"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise UsageError(
            f"the model differs from the checkpoint {os.fspath(path)}: {'; '.join(differences)}; "
            "use the config.yaml beside the checkpoint, or start a new run without --ckpt_path"
        )


def _leaves(tree: object, prefix: str = "model") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}")
    else:
        yield prefix, list(tree) if isinstance(tree, (list, tuple)) else tree


def _show(value: object) -> str:
    return "not set" if value is None else repr(value)


def _build(value: Any, path: str | os.PathLike[str], trusted: tuple[str, ...], *, factory: bool = False) -> Any:
    """Build the object that a `class_path` with `init_args` describes; return other values unchanged.

    Args:
        value: of the configuration.
        path: of the checkpoint, for messages.
        trusted: packages whose classes may be built.
        factory: return a function that builds the object, for parameters that take one.
    """
    if isinstance(value, (list, tuple)):
        return [_build(item, path, trusted, factory=factory) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {key: _build(item, path, trusted) for key, item in value.items()}
    cls = _trusted_class(str(value["class_path"]), path, trusted)
    parameters = inspect.signature(cls).parameters
    init_args = {**value.get("init_args", {}), **value.get("dict_kwargs", {})}
    for fetched in {"pretrained", "weights"} & init_args.keys() & parameters.keys():
        init_args[fetched] = parameters[fetched].default  # the checkpoint's weights replace pretrained ones
    arguments = {
        key: _build(item, path, trusted, factory=key in parameters and "Callable" in str(parameters[key].annotation))
        for key, item in init_args.items()
    }
    try:
        return partial(cls, **arguments) if factory else cls(**arguments)
    except (TypeError, ValueError) as error:
        raise DataError(f"{os.fspath(path)} describes a {cls.__name__} that cannot be built: {error}") from error


def _trusted_class(class_path: str, path: str | os.PathLike[str], trusted: tuple[str, ...]) -> type:
    refusal = DataError(
        f"{os.fspath(path)} names {class_path}, which is not a module of {', '.join(trusted)}; "
        f"if the class is yours, load the checkpoint with trust=[{class_path.split('.')[0]!r}]"
    )
    module, _, name = class_path.rpartition(".")
    if not _is_below(module, trusted):
        raise refusal
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{os.fspath(path)} names {class_path}, which does not exist here") from error
    # a trusted module may import foreign names (`visionattn.x.os`), so the class itself must be defined in a trusted
    # package
    if not (inspect.isclass(found) and issubclass(found, _BUILT_FROM_CHECKPOINTS)):
        raise refusal
    if not _is_below(found.__module__, trusted):
        raise refusal
    return found


def _is_below(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
