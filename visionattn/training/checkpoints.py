"""Checkpoints that describe their own task, and functions that read checkpoints without running code from them.

A checkpoint of visionattn is a Lightning checkpoint with an additional entry `visionattn`: the task's configuration,
the preprocessing and the class names, as plain data. A checkpoint from an untrusted source could name any class in this
entry, so `load` builds only classes of the packages in `TRUSTED`. To send a checkpoint to others, export it as a
.safetensors file, which holds the weights and the entry. The .safetensors format cannot hold code.
"""

import dataclasses
import importlib
import inspect
import json
import os
import re
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
from visionattn.files import local_path, write_file
from visionattn.models import architectures_in, only_known_architectures, weights_mismatch
from visionattn.tasks import CHECKPOINT_ENTRY
from visionattn.training.hub import PREFIX, fetch

TRUSTED = (
    "visionattn",
    "torch.nn",
    "torch.optim",
    "torchvision.models",
    "torchvision.ops",
    "timm.models",
    "timm.layers",
)
"""Packages whose modules, optimizers and schedulers that `load` builds if a checkpoint names them.

`timm.task` is not among them: its distillation teacher opens the file that its arguments name.
"""

SAFETENSORS: Final = ".safetensors"
"""Suffix of a file that `export` writes."""

_TOKENS = "model.init_args.network.init_args.tokens."
_OF_WEIGHTS = re.compile("checkpoint|pretrained|weights|cache|path|file|url|hub")
"""What an option of a timm model that loads weights has in its name."""

_BUILT_FROM_CHECKPOINTS = (nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


class Description(TypedDict):
    """The entry `visionattn` of a checkpoint.

    Keys:
        model: the `model` section of the configuration: `class_path` and `init_args`, as plain data.
        class_names: names of the network's outputs.
        preprocess: the fields of `Preprocess`, or None if unknown.
        architectures: name → architecture of networks that are named by a place, see `models.architectures`.
    """

    model: Mapping[str, Any]
    class_names: list[str]
    preprocess: Mapping[str, Any] | None
    architectures: Mapping[str, Mapping[str, Any]]


class CheckpointContent(TypedDict, total=False):
    """The entries of a checkpoint that visionattn uses."""

    state_dict: dict[str, torch.Tensor]
    visionattn: Description
    hyper_parameters: object


class DescribeCheckpoint(Callback):
    """Add the description that `load` needs to every checkpoint.

    Args:
        model: the `model` section of the configuration: `class_path` and `init_args`, as plain data.
    """

    def __init__(self, model: Mapping[str, Any]) -> None:
        self.model = model

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        preprocess = getattr(getattr(trainer, "datamodule", None), "preprocess", None)
        checkpoint[CHECKPOINT_ENTRY] = {
            "model": self.model,
            "class_names": list(getattr(pl_module, "class_names", ())),
            "preprocess": dataclasses.asdict(preprocess) if preprocess else None,
            "architectures": architectures_in(pl_module),
        }


def load(path: str | os.PathLike[str], *, trust: Sequence[str] = ()) -> L.LightningModule:
    """Load the task of a checkpoint with its weights.

    Args:
        path: a .ckpt written by `visionattn fit`, a .safetensors written by `visionattn export`, or a model on the
            Hugging Face hub, `hf://owner/name`.
        trust: names of your own packages whose classes the checkpoint may use, in addition to `TRUSTED`.

    Returns:
        The task in evaluation mode, on the CPU. Its attribute `network` is the model, `class_names` has the names of
        the outputs, and `preprocess` converts images to the model's input.

    Raises:
        UsageError: the name on the hub is malformed, or the path is another address.
        DataError: the file is missing, cut short or not a checkpoint, contains code, uses a class outside of the
            trusted packages, or was not written by visionattn.
    """
    content = read(path)
    entry = content[CHECKPOINT_ENTRY]
    model = entry["model"]
    args = dict(model.get("init_args", {}))
    args |= {name: None for name in ("optimizer", "lr_scheduler") if name in args}
    known = {name: _shape_options(fields, path) for name, fields in entry.get("architectures", {}).items()}
    with only_known_architectures(known):
        task = _build({**model, "init_args": args}, path, (*TRUSTED, *trust))
    if not isinstance(task, L.LightningModule):
        raise DataError(f"{os.fspath(path)} describes a {type(task).__name__}, which is not a LightningModule")
    try:
        task.load_state_dict(content["state_dict"], strict=True)
    except RuntimeError as error:
        reason = weights_mismatch(task, content["state_dict"]) or str(error)
        raise DataError(f"the weights in {os.fspath(path)} do not fit the model in the same file: {reason}") from error
    vars(task)["class_names"] = tuple(
        entry.get("class_names", ())
    )  # vars(), since LightningModule declares no such attribute
    vars(task)["preprocess"] = _preprocess(entry.get("preprocess"), path)
    return task.eval()


def _preprocess(entry: Mapping[str, Any] | None, path: str | os.PathLike[str]) -> Preprocess | None:
    if not entry:
        return None
    options: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()}
    try:
        return Preprocess(**options)  # JSON has turned tuples into lists
    except (TypeError, ValueError, IndexError) as error:
        raise DataError(f"{os.fspath(path)} describes a preprocessing that cannot be used: {error}") from error


def export(path: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write a checkpoint as a .safetensors file, which `load` can read.

    Args:
        path: see `load`.
        out: the file to write.

    Raises:
        DataError: `path` cannot be read, see `load`; or `out` cannot be written.
    """
    from safetensors.torch import save

    content = read(path)
    # the format does not allow tensors that share memory, so clone() makes a copy of each tied weight
    state = {name: value.detach().clone().contiguous() for name, value in content["state_dict"].items()}
    write_file(out, save(state, metadata={"format": "pt", CHECKPOINT_ENTRY: json.dumps(content[CHECKPOINT_ENTRY])}))


def read(path: str | os.PathLike[str]) -> CheckpointContent:
    """Read a checkpoint of visionattn as tensors and plain data, without running code from the file.

    Raises:
        DataError: see `load`.
    """
    name = os.fspath(path)
    if name.startswith(PREFIX):
        path = name = fetch(name)
    local_path(name)
    if not os.path.isfile(path):
        raise DataError(f"there is no checkpoint {name}")
    try:
        content = _read_safetensors(path) if name.endswith(SAFETENSORS) else _read_archive(path)
    except DataError:
        raise
    except Exception as error:  # torch and zipfile raise many kinds of exceptions
        reason = (
            "it contains code" if "weights_only" in str(error).lower() else "it is cut short or another kind of file"
        )
        if _is_pickle(path):
            reason = (
                "it is a pickle, as torch wrote before version 1.6, which could contain code; if you trust the file, "
                "write it again with a newer torch: torch.save(torch.load(FILE, weights_only=False), FILE)"
            )
        raise DataError(f"{name} cannot be read as a checkpoint: {reason}") from error
    if isinstance(content, dict) and "pytorch-lightning_version" in content and CHECKPOINT_ENTRY not in content:
        raise DataError(
            f"{name} is a checkpoint of Lightning without the description of its task that tasks of visionattn add; "
            f"give its network as --model NAME or MODULE:FUNCTION with --weights {name}"
        )
    if isinstance(content, dict) and isinstance(entry := content.get(CHECKPOINT_ENTRY), dict) and "unknown" in entry:
        raise DataError(
            f"{name} was trained by a plain L.Trainer and cannot say what its network is: {entry['unknown']}; give the "
            f"network as --model NAME or MODULE:FUNCTION with --weights {name}"
        )
    if (
        not isinstance(content, dict)
        or "state_dict" not in content
        or not isinstance(content.get(CHECKPOINT_ENTRY), dict)
    ):
        raise DataError(
            f"{name} was not written by visionattn; if it holds plain weights, give it as the network's `weights`"
        )
    if wrong := _malformed(content):
        raise DataError(f"{name} is damaged or was changed by hand: its {wrong}")
    return cast(CheckpointContent, content)


def described_weights(path: str | os.PathLike[str]) -> tuple[Preprocess | None, tuple[str, ...]]:
    """Return the preprocessing and class names in a checkpoint whose weights are used for a network of another source.

    Returns:
        (None, ()) for files that describe neither.
    """
    try:
        content = _read_safetensors(path) if os.fspath(path).endswith(SAFETENSORS) else _read_archive(path)
    except Exception:  # whatever else the file is, the caller reads its weights and reports errors
        return None, ()
    entry = content.get(CHECKPOINT_ENTRY) if isinstance(content, dict) else None
    if not isinstance(entry, dict):
        return None, ()
    names = entry.get("class_names")
    known = tuple(names) if isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names) else ()
    preprocess = entry.get("preprocess")
    return _preprocess(preprocess, path) if isinstance(preprocess, Mapping) else None, known


def _is_pickle(path: str | os.PathLike[str]) -> bool:
    with open(path, "rb") as file:
        return file.read(1) == b"\x80"  # the first byte of every pickle since protocol 2


def _malformed(content: Mapping[str, Any]) -> str:
    """Return what in the content does not have the types of `CheckpointContent`, or ""."""
    state, entry = content["state_dict"], content[CHECKPOINT_ENTRY]
    names, preprocess = entry.get("class_names", []), entry.get("preprocess")
    if not isinstance(state, Mapping) or not all(isinstance(key, str) for key in state):
        return "state_dict does not map names to tensors"
    if not isinstance(entry.get("model"), Mapping) or "class_path" not in entry["model"]:
        return f"entry {CHECKPOINT_ENTRY}.model has no class_path"
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
        return f"entry {CHECKPOINT_ENTRY}.class_names is not a list of names"
    if preprocess is not None and not isinstance(preprocess, Mapping):
        return f"entry {CHECKPOINT_ENTRY}.preprocess does not map options to values"
    places = entry.get("architectures", {})
    if not isinstance(places, Mapping) or not all(isinstance(fields, Mapping) for fields in places.values()):
        return f"entry {CHECKPOINT_ENTRY}.architectures does not map names to options"
    return _malformed_class(entry["model"], f"{CHECKPOINT_ENTRY}.model")


def _malformed_class(tree: object, place: str) -> str:
    """Return where a tree of `class_path` and `init_args` is malformed, or ""."""
    if isinstance(tree, (list, tuple)):
        tree = dict(enumerate(tree))
    if not isinstance(tree, Mapping):
        return ""
    if "class_path" in tree:
        if not isinstance(tree["class_path"], str):
            return f"entry {place}.class_path is not a name"
        for part in ("init_args", "dict_kwargs"):
            if not isinstance(tree.get(part, {}), Mapping):
                return f"entry {place}.{part} does not map options to values"
    return next(filter(None, (_malformed_class(value, f"{place}.{key}") for key, value in tree.items())), "")


def _read_archive(path: str | os.PathLike[str]) -> object:
    with zipfile.ZipFile(path) as archive:  # refuses torch's older formats, which are pickles and not zip files
        # torch writes uncompressed records, so a file that unpacks to more bytes was made to fill the memory
        if sum(record.file_size for record in archive.infolist()) > os.path.getsize(path):
            raise DataError(f"{os.fspath(path)} unpacks to more bytes than a checkpoint of its size can hold")
    return torch.load(path, map_location="cpu", weights_only=True)


def _read_safetensors(path: str | os.PathLike[str]) -> dict[str, object]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        entry = (file.metadata() or {}).get(CHECKPOINT_ENTRY)
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # safe_open returns no dict
    return {"state_dict": state, **({} if entry is None else {CHECKPOINT_ENTRY: json.loads(entry)})}


def check_against(path: str | os.PathLike[str], model: Mapping[str, Any], *, training: bool = True) -> tuple[str, ...]:
    """Check that the model of a configuration equals the model of a checkpoint.

    Without this check, Lightning would use the checkpoint's hyper-parameters and the configuration's network, and
    ignore differences.

    Args:
        path: of the checkpoint.
        model: the `model` section of the configuration.
        training: whether the run continues training (default: True). If False, the network's option `tokens` may
            differ, since token reduction has no weights: a network trained with all tokens can be tested with fewer.

    Returns:
        The class names of the checkpoint; empty if unknown.

    Raises:
        UsageError: the classes or the options of the models differ; the message names every difference.
        DataError: the checkpoint cannot be read, see `load`, or has hyper-parameters.
    """
    content = read(path)
    if content.get("hyper_parameters"):
        raise DataError(
            f"{os.fspath(path)} has hyper-parameters, which would replace yours; checkpoints of visionattn have none"
        )
    saved = content[CHECKPOINT_ENTRY]["model"]
    if saved.get("class_path") != model.get("class_path"):
        raise UsageError(
            f"{os.fspath(path)} is a checkpoint of {saved.get('class_path')}, but the config has "
            f"{model.get('class_path')}; use the config.yaml in the folder of the checkpoint"
        )
    ours, theirs = (
        {key: value for key, value in _leaves(tree) if training or not f"{key}.".startswith(_TOKENS)}
        for tree in (model, saved)
    )
    differences = [
        f"{key} is {_show(ours.get(key))} in the config and {_show(theirs.get(key))} in the checkpoint"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    ]
    if differences:
        raise UsageError(
            f"the model differs from the checkpoint {os.fspath(path)}: {'; '.join(differences)}; "
            "use the config.yaml in the folder of the checkpoint, or start a new run without --ckpt_path"
        )
    return tuple(content[CHECKPOINT_ENTRY].get("class_names", ()))


def _leaves(tree: object, prefix: str = "model") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}")
    else:
        yield prefix, list(tree) if isinstance(tree, (list, tuple)) else tree


def _show(value: object) -> str:
    return "not set" if value is None else repr(value)


def _build(value: Any, path: str | os.PathLike[str], trusted: tuple[str, ...], *, factory: bool = False) -> Any:
    """Build the object of a `class_path` with `init_args` (with `factory`, a function that builds it); keep others."""
    if isinstance(value, (list, tuple)):
        return [_build(item, path, trusted, factory=factory) for item in value]
    if not isinstance(value, Mapping):
        return value
    if "class_path" not in value:
        return {key: _build(item, path, trusted) for key, item in value.items()}
    cls = _trusted_class(str(value["class_path"]), path, trusted)
    parameters = inspect.signature(cls).parameters
    init_args = {**value.get("init_args", {}), **value.get("dict_kwargs", {})}
    for fetched in {"pretrained", "weights", "new_head"} & init_args.keys() & parameters.keys():
        init_args[fetched] = parameters[fetched].default  # do not load pretrained weights that `load` would replace
    if isinstance(options := init_args.get("options"), Mapping):  # of `timm.create_model`
        init_args["options"] = _shape_options(options, path)
    arguments = {
        key: _build(item, path, trusted, factory=key in parameters and "Callable" in str(parameters[key].annotation))
        for key, item in init_args.items()
    }
    try:
        return partial(cls, **arguments) if factory else cls(**arguments)
    except (TypeError, ValueError) as error:
        raise DataError(f"{os.fspath(path)} describes a {cls.__name__} that cannot be built: {error}") from error


def _shape_options(options: Mapping[str, Any], path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the options of a model that build its shape; those that load weights are dropped.

    The checkpoint's weights replace all others, and a checkpoint must not open files or connections.

    Raises:
        DataError: an option is neither a number nor a word, nor a list of these.
    """
    shape = {
        key: _shape_options(value, path) if isinstance(value, Mapping) else value
        for key, value in options.items()
        if not _OF_WEIGHTS.search(str(key))
    }
    for key, value in shape.items():
        if not _is_plain(value):
            raise DataError(
                f"{os.fspath(path)} gives the option {key} = {value!r} to a model; "
                "a checkpoint may give numbers, words, and lists and mappings of these"
            )
    return shape


def _is_plain(value: object) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, Mapping):
        return _is_plain([*value, *value.values()])
    if isinstance(value, str):
        return re.fullmatch(r"\w[\w-]*", value) is not None  # neither a path nor an address
    return value is None or isinstance(value, (bool, int, float))


def _trusted_class(class_path: str, path: str | os.PathLike[str], trusted: tuple[str, ...]) -> type:
    refusal = DataError(
        f"{os.fspath(path)} names {class_path}, which is not a module of {', '.join(trusted)}; "
        f"if the class is yours, pass --trust {class_path.split('.')[0]}, or trust=[…] in Python"
    )
    module, _, name = class_path.rpartition(".")
    if not _is_below(module, trusted):
        raise refusal
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"{os.fspath(path)} names {class_path}, which this installation does not have") from error
    # a name in a trusted module may be imported from elsewhere (`visionattn.x.os`), so check where the class is defined
    if not (inspect.isclass(found) and issubclass(found, _BUILT_FROM_CHECKPOINTS)):
        raise refusal
    if not _is_below(found.__module__, trusted):
        raise refusal
    return found


def _is_below(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)
