"""The architecture of a named model, and the arguments of a network, as plain data for checkpoints.

The name of a model on the hub or in a folder does not describe its layers. So a checkpoint also holds the architecture,
and loading a checkpoint neither asks the hub nor opens other files.
"""

import contextlib
import functools
import inspect
import sys
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeAlias
from weakref import WeakKeyDictionary

from torch import nn

from visionattn.errors import DataError

Architecture: TypeAlias = Mapping[str, Any]
"""Plain data: `architecture` and `options` of a timm model, or `model_type` and further fields of transformers."""

_arguments: "WeakKeyDictionary[nn.Module, dict[str, Any]]" = WeakKeyDictionary()
_known: ContextVar[Mapping[str, Architecture] | None] = ContextVar("known architectures", default=None)


@contextlib.contextmanager
def only_known_architectures(known: Mapping[str, Architecture]) -> Iterator[None]:
    """In this context, build models of the hub or of a folder only from these architectures (name → architecture)."""
    token = _known.set(known)
    try:
        yield
    finally:
        _known.reset(token)


def known_architecture(name: str) -> Architecture | None:
    """Return the architecture to build a named model from; None if the hub or the folder may be read.

    Raises:
        DataError: only known architectures may be used, and none is known for this name.
    """
    known = _known.get()
    if known is not None and name not in known:
        raise DataError(f"the checkpoint names the model {name!r} without its architecture, so it cannot be built")
    return None if known is None else known[name]


def remember_architecture(model: nn.Module, name: str, architecture: Architecture) -> None:
    """Note in a model by which name it was made, and its architecture."""
    vars(model)["named_architecture"] = (name, dict(architecture))  # vars(): modules declare no such attribute


def architectures_in(model: nn.Module) -> dict[str, Architecture]:
    """Return name → architecture of those parts of a model that were made from a name on the hub or of a folder."""
    found = [vars(part).get("named_architecture") for part in model.modules()]
    return {pair[0]: pair[1] for pair in found if pair is not None}


def remember_arguments(module: nn.Module) -> None:
    """Note the arguments with which a module is being made; called by its `__init__`, after that of `nn.Module`.

    If a subclass calls this `__init__`, the arguments are those of the subclass.
    """
    frame, outer = sys._getframe(1), None
    while frame.f_code.co_name == "__init__" and frame.f_locals.get("self") is module and frame.f_back is not None:
        frame, outer = frame.f_back, frame
    if outer is None or outer.f_code.co_flags & inspect.CO_VARARGS:
        return
    code, values = outer.f_code, outer.f_locals
    count = code.co_argcount + code.co_kwonlyargcount
    arguments = {name: values[name] for name in code.co_varnames[1:count]}
    if code.co_flags & inspect.CO_VARKEYWORDS:
        arguments |= values[code.co_varnames[count]]
    _arguments[module] = arguments


def description_of(module: nn.Module, *, leave_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return a module as `class_path` and `init_args`, plain data from which it can be built again.

    Args:
        module: a module whose class calls `remember_arguments`, such as a task, a `Classifier` or a `ConvNet`.
        leave_out: names of arguments that are left out.

    Raises:
        DataError: the module cannot be described; the message says which part.
    """
    arguments = {name: value for name, value in _arguments.get(module, {}).items() if name not in leave_out}
    if module not in _arguments:
        raise DataError(f"the arguments of the {_path(type(module))} are not known")
    return {
        "class_path": _path(type(module)),
        "init_args": {name: _described(value, name) for name, value in arguments.items()},
    }


def _described(value: object, name: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (list, tuple)):
        return [_described(item, name) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _described(item, name) for key, item in value.items()}
    if isinstance(value, nn.Module):
        return description_of(value)
    if isinstance(value, type):
        return {"class_path": _path(value)}
    if isinstance(value, functools.partial) and isinstance(value.func, type) and not value.args:
        return {"class_path": _path(value.func), "init_args": _described(value.keywords, name)}
    raise DataError(f"its argument {name} is a {type(value).__name__}, which is no plain data")


def _path(kind: type) -> str:
    """Return the name by which a class is imported.

    Raises:
        DataError: it cannot be imported by another program.
    """
    if kind.__module__ == "__main__" or "<locals>" in kind.__qualname__:
        raise DataError(f"its class {kind.__qualname__} is not in a module that can be imported")
    return f"{kind.__module__}.{kind.__qualname__}"
