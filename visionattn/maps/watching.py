"""Stand beside a model while it runs: which module is at work, and which functions it calls.

Nothing is put into the model but forward hooks, and those are gone when the context ends, after an exception too.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from typing_extensions import Self

ATTENTION = frozenset({F.scaled_dot_product_attention})
SOFTMAX = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax})
_BUILT_IN = tuple(
    f"torch.nn.modules.{kind}" for kind in ("linear", "conv", "normalization", "dropout", "batchnorm", "pooling")
)


_surveying = threading.local()


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Let a model run without any watcher that is on duty hearing of it, but for those that start inside."""
    before = getattr(_surveying, "depth", 0)
    _surveying.depth = before + 1
    try:
        yield
    finally:
        _surveying.depth = before


class Watcher(TorchFunctionMode):
    """Follows a running model; subclasses say what they do at each event.

    Attributes:
        stack: names of the modules at work, outermost first.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self._thread = threading.get_ident()
        self._depth = 0
        self._handles: list[Any] = []
        self._undo = contextlib.ExitStack()

    # Events ---------------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The outermost module starts: the model is called."""

    def end(self) -> None:
        """The outermost module has returned."""

    def enter(self, name: str, module: nn.Module) -> None:
        """A module starts."""

    def leave(self, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        """A module returns `out`; what this returns replaces it, unless None."""

    def fused(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """`F.scaled_dot_product_attention` is called."""
        return func(*args, **kwargs)

    def softmax(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A softmax is called."""
        return func(*args, **kwargs)

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Another function of torch is called."""
        return func(*args, **kwargs)

    def watched(self, module: nn.Module) -> bool:
        """Whether to hear of this module's start and end; leaves of torch.nn do not attend."""
        return not isinstance(module, nn.Softmax) and not type(module).__module__.startswith(_BUILT_IN)

    # Machinery ------------------------------------------------------------------------------------------------------

    @property
    def _deaf(self) -> bool:
        return getattr(_surveying, "depth", 0) != self._depth or threading.get_ident() != self._thread

    @property
    def where(self) -> str:
        """Name of the innermost module at work."""
        return self.stack[-1] if self.stack else ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._deaf:
            return func(*args, **kwargs)
        if func in ATTENTION:
            return self.fused(func, args, kwargs)
        if func in SOFTMAX:
            return self.softmax(func, args, kwargs)
        if func is F.multi_head_attention_forward:
            with self._inside_multi_head_attention():
                return self.other(func, args, kwargs)
        return self.other(func, args, kwargs)

    @contextlib.contextmanager
    def _inside_multi_head_attention(self) -> Iterator[None]:
        """The mode is off inside a function that it handles, so reach the inner calls by their global names."""
        originals = {"scaled_dot_product_attention": self.fused, "softmax": self.softmax}

        def hear(original: Callable[..., Any], event: Callable[..., Any]) -> Callable[..., Any]:
            def heard(*args: Any, **kwargs: Any) -> Any:
                if threading.get_ident() != self._thread:  # another thread's model is not ours to watch
                    return original(*args, **kwargs)
                return event(original, args, kwargs)

            return heard

        saved = {name: getattr(F, name) for name in originals}
        try:
            for name, event in originals.items():
                setattr(F, name, hear(saved[name], event))
            yield
        finally:
            for name, original in saved.items():
                setattr(F, name, original)

    def __enter__(self) -> "Self":
        self._depth = getattr(_surveying, "depth", 0)
        self._undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
        torch.backends.mha.set_fastpath_enabled(False)  # it computes attention inside one opaque kernel
        if any(module._compiled_call_impl is not None for module in self.names):
            self._undo.enter_context(
                torch.compiler.set_stance("force_eager")
            )  # compiled code calls no function of torch
        for module in self.names:
            if module is self.model or self.watched(module):
                self._handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                    module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
                ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.stack.clear()
        self._undo.close()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._deaf:
            return
        if not self.stack:
            self.begin(module, args, kwargs)
        self.stack.append(self.names[module])
        self.enter(self.stack[-1], module)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        if self._deaf or not self.stack:
            return None
        name = self.stack.pop()
        try:
            return None if out is None else self.leave(name, module, args, kwargs, out)
        finally:
            if not self.stack:
                self.end()
