"""Import packages only when they are first used, although torchmetrics imports them at its start.

torchmetrics has metrics for text and sound. For these it imports transformers and scipy.signal, if they are installed,
which takes more than a second of every start.
"""

import contextlib
import importlib
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

_DEFERRED = ("transformers", "scipy.signal")


@contextlib.contextmanager
def deferred_imports() -> Iterator[None]:
    """In the `with` block, import stand-ins for some packages; the packages are loaded when the stand-ins are used.

    After the block, an import loads the real package. A package that was loaded before is not replaced.
    """
    stand_ins = {name: _StandIn(name) for name in _DEFERRED if name not in sys.modules}
    sys.modules.update(stand_ins)
    try:
        yield
    finally:
        for name, stand_in in stand_ins.items():
            if sys.modules.get(name) is stand_in:
                del sys.modules[name]


class _StandIn(ModuleType):
    """A module whose members load the real module when they are used."""

    def __getattr__(self, name: str) -> Any:  # a member of a module can be anything
        if name.startswith("__"):
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            return _Member(name, (), {"module": self.__name__})
        return getattr(importlib.import_module(self.__name__), name)


class _Member(type):
    """A class that stands for a member of a module, so that it can be named in annotations before it is loaded."""

    module: str

    def _load(cls) -> Any:  # see `_StandIn`
        return getattr(importlib.import_module(cls.module), cls.__name__)

    def __getattr__(cls, name: str) -> Any:  # see `_StandIn`
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(cls._load(), name)

    def __call__(cls, *args: Any, **options: Any) -> Any:  # see `_StandIn`
        return cls._load()(*args, **options)

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls._load())
