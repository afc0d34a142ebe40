"""Files of weights: reading them without running code from them, and loading them into a network.

A file may hold more than the network, under other names: the weights of a whole task, of a wrapped network, or of a
network with another head. `load_weights` finds the entries of the network by their names.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.errors import DataError, UsageError, first_line
from visionattn.files import local_path, printable

_NESTED = ("state_dict", "model", "model_state_dict", "net", "network", "model_ema", "state_dict_ema", "ema", "teacher")
"""Keys under which a file of torch holds its weights; the first with a tensor is taken."""

_WRAPPERS = ("module.", "_orig_mod.", "model.", "backbone.")
_PART = re.compile(r"-\d{5}-of-\d{5}\.")


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read the weights in a file; no code in it is executed.

    Args:
        path: a .safetensors file, a file of torch (also of the format before version 1.6), or `*.index.json`, the index
            of several such files. In a file of torch, the weights may have the key `state_dict`, `model`, `model_ema`,
            `ema`, `teacher` or the like.

    Raises:
        DataError: there is no such file, it holds no weights that can be read safely, or it is one of several parts.
    """
    local_path(path)
    name = os.fspath(path)
    if not os.path.isfile(name):
        raise DataError(f"there is no weights file {printable(name)}")
    if _PART.search(os.path.basename(name)):
        index = _PART.sub(".", name) + ".index.json"
        raise DataError(f"{printable(name)} is one part of several; give their index, e.g. {printable(index)}")
    return _read_index(name) if name.endswith(".json") else _read_file(name)


def _read_file(name: str) -> dict[str, Tensor]:
    try:
        if name.endswith(".safetensors"):
            from safetensors.torch import load_file

            return load_file(name)
        content = torch.load(name, map_location="cpu", weights_only=True)
    except Exception as error:  # a truncated file, not a checkpoint, or a pickle that would run code
        reason = first_line(error)
        if "weights_only" in str(error).lower() or "weights only" in str(error).lower():
            reason = "it contains code, such as a pickled network; save its state_dict() instead"
        raise DataError(f"{printable(name)} holds no weights that can be read safely: {reason}") from error
    state = {key: value for key, value in _unnested(content).items() if isinstance(value, Tensor)}
    if not state:
        raise DataError(f"{printable(name)} holds no weights: there is no tensor in it or under {', '.join(_NESTED)}")
    return {str(key): value.detach() for key, value in state.items()}


def _unnested(content: object, depth: int = 3) -> Mapping[str, Any]:
    """Return the innermost mapping of names to tensors, at most `depth` levels below the content."""
    if not isinstance(content, Mapping):
        return {}
    for key in _NESTED if depth else ():
        inner = _unnested(content.get(key), depth - 1)
        if any(isinstance(value, Tensor) for value in inner.values()):
            return inner
    return content


def _read_index(name: str) -> dict[str, Tensor]:
    """Read the parts that an index lists; they lie in its folder."""
    try:
        content = json.loads(Path(name).read_text(encoding="utf-8"))
        parts = sorted({str(part) for part in content["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{printable(name)} is no index of weights, which lists their files as weight_map") from error
    state: dict[str, Tensor] = {}
    for part in parts:
        path = os.path.join(os.path.dirname(name), part)
        if os.path.basename(part) != part or part.endswith(".json"):
            raise DataError(f"{printable(name)} names the part {printable(part)}, which must lie in the same folder")
        if not os.path.isfile(path):
            raise DataError(f"{printable(name)} names the part {printable(part)}, but there is no such file beside it")
        state |= _read_file(path)
    return state


def load_weights(
    model: nn.Module, path: str | os.PathLike[str], *, new_head: bool = False, name: str | None = None
) -> None:
    """Load a file of weights into a model, in place.

    The names in the file may share a prefix, such as `module.`, `backbone.` or `network.`, which is removed.

    Args:
        model: the model.
        path: see `read_state`.
        new_head: load all weights but those of the head, the last linear layer or convolution that the model
            registered. The error stream names this layer, and entries of the file that the model does not have
            (default: all weights must fit).
        name: name of the model in messages (default: the name of its class).

    Raises:
        DataError: the file cannot be read, or the weights do not fit; the message has three names of each kind.
    """
    load_state(model, read_state(path), path, new_head=new_head, name=name)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    heads: Sequence[str] | None = None,
    new_head: bool = False,
    name: str | None = None,
) -> None:
    """Load the weights that were read from a file; see `load_weights`.

    Args:
        heads: names of the model's heads (default: its last layer, which is then named on the error stream).
    """
    state = without_prefix(state, model)
    head = tuple(f"{name}." for name in heads or (head_of(model),))
    wanted = {key: value for key, value in model.state_dict().items() if not (new_head and key.startswith(head))}
    if new_head:
        if heads is None:
            print(
                f"{printable(os.fspath(path))}: all weights are loaded but those of {head_of(model)}, the last layer "
                f"of {name or type(model).__name__}",
                file=sys.stderr,
            )
        unused = [key for key in state if key not in wanted and not key.startswith(head)]
        state = {key: value for key, value in state.items() if key in wanted}
        if unused:
            print(
                f"the model does not use {_count(unused, 'of the weights')} in {printable(os.fspath(path))}",
                file=sys.stderr,
            )
    if reason := _mismatch(wanted, state):
        raise mismatch_error(path, name or type(model).__name__, reason, only_head=_only_head(wanted, state, head))
    model.load_state_dict(state, strict=not new_head)


def load_classifier(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | os.PathLike[str],
    *,
    heads: Sequence[str],
    num_classes: int | None,
    new_head: bool,
    name: str,
) -> None:
    """Load the weights that were read from a file into a classifier, which then has `num_classes` outputs.

    Args:
        model: the classifier.
        state, path: the weights and their file.
        heads: names of the model's heads.
        num_classes: number of outputs (default: as many as in the weights; with new_head, as many as the model has).
        new_head, name: see `load_weights`.
    """
    wanted = num_classes if new_head else head_rows(without_prefix(state, model), heads[0])
    replace_heads(model, heads, wanted)
    load_state(model, state, path, heads=heads, new_head=new_head, name=name)
    replace_heads(model, heads, num_classes)


def require_weights(weights: object) -> None:
    """Refuse a new head without a file of weights.

    Raises:
        UsageError: there are no weights.
    """
    if weights is None:
        raise UsageError("new_head (--new-head) needs weights (--weights), from which all but the head is loaded")


def mismatch_error(path: str | os.PathLike[str], name: str, reason: str, *, only_head: bool = False) -> DataError:
    """Return the error for weights that do not fit; with `only_head`, it says how to load all others."""
    remedy = "; for a new head, add --new-head (new_head: true in YAML)" if only_head else ""
    return DataError(
        f"the weights in {printable(os.fspath(path))} (--weights) do not fit this {name}: {reason}{remedy}"
    )


def _only_head(wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], head: tuple[str, ...]) -> bool:
    fitting = {key for key, value in wanted.items() if key in state and state[key].shape == value.shape}
    return all(key.startswith(head) for key in wanted.keys() - fitting)


def without_prefix(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the entries of a state dict under the prefix that most of the model's names have there, without it.

    For example, a checkpoint of a task holds the network under `network.`, and its other entries are dropped.
    """
    endings = {name.rpartition(".")[2] for name in model.state_dict()}
    own = model.state_dict().keys()
    prefixes = Counter[str]()
    for name in state:
        parts = name.split(".")
        if parts[-1] in endings:
            suffixes = ((place, ".".join(parts[place:])) for place in range(len(parts)))
            prefixes.update("".join(f"{part}." for part in parts[:place]) for place, end in suffixes if end in own)
    if not prefixes:
        return dict(state)
    prefix = max(prefixes, key=lambda known: (prefixes[known], -len(known)))
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def without_wrappers(state: Mapping[str, Tensor], anchors: Sequence[str]) -> dict[str, Tensor]:
    """Remove the prefix of a timm model's state dict, of which only some names are known.

    Args:
        state: a state dict whose names may all start with the same prefix.
        anchors: names that the model has, e.g. `conv1.weight`. If the state dict has one of them with a prefix, the
            shortest such prefix is removed from all names. Otherwise prefixes such as `module.` are removed, if all
            names have them.
    """
    prefixes = sorted(
        (
            name.removesuffix(anchor)
            for anchor in anchors
            for name in state
            if name == anchor or name.endswith(f".{anchor}")
        ),
        key=len,
    )
    if prefixes:
        prefix = prefixes[0]
        return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    while state and (prefix := next((known for known in _WRAPPERS if all(n.startswith(known) for n in state)), "")):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return dict(state)


def weights_mismatch(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return how a state dict differs from a model's: three names and a count of each kind of difference, or ""."""
    return _mismatch(model.state_dict(), state)


def _mismatch(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> str:
    shapes = [
        f"{name} {tuple(state[name].shape)} and not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": shapes,
    }
    return "; ".join(_count(names, kind) for kind, names in kinds.items() if names)


def _count(names: Sequence[str], kind: str = "weights") -> str:
    return f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"


def head_of(model: nn.Module) -> str:
    """Return the name of a classifier's head: the last linear layer or convolution that the network registered."""
    names = [name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d))]
    return names[-1] if names else ""


def outputs_of(model: nn.Module, head: str) -> int:
    """Return the number of outputs of a head; 0 if it is no linear layer or convolution."""
    part = model.get_submodule(head)
    return int(getattr(part, "out_features", 0) or getattr(part, "out_channels", 0))


def replace_heads(model: nn.Module, heads: Sequence[str], num_classes: int | None) -> None:
    """Replace the heads of a classifier that have another number of outputs, in place; None keeps all."""
    for name in heads:
        if num_classes in (None, outputs_of(model, name)):
            continue
        assert num_classes is not None
        old = model.get_submodule(name)
        bias = getattr(old, "bias", None) is not None
        new: nn.Module
        if isinstance(old, nn.Linear):
            new = nn.Linear(old.in_features, num_classes, bias=bias)
        else:
            assert isinstance(old, nn.Conv2d)
            new = nn.Conv2d(old.in_channels, num_classes, old.kernel_size, old.stride, old.padding, bias=bias)  # type: ignore[arg-type]  # pairs of int
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, new)


def head_rows(state: Mapping[str, Tensor], head: str) -> int | None:
    """Return the number of outputs of the head in a state dict; None if it has no such head."""
    weight = state.get(f"{head}.weight")
    return None if weight is None else weight.shape[0]
