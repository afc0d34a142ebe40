"""Watchers: contexts that follow which module of a running model is executing, and which functions of torch it calls.

A watcher adds only forward hooks to the model, and removes them when the context ends, even after an exception.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from visionattn.attention import MaskedAttention, Retina, View

if TYPE_CHECKING:
    from typing_extensions import Self

# modules and functions of users' models take any arguments and return any value
Func: TypeAlias = Callable[..., Any]
Args: TypeAlias = tuple[Any, ...]
Kwargs: TypeAlias = dict[str, Any]

ATTENTION = frozenset({F.scaled_dot_product_attention})
SOFTMAX = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax})
_INTERCEPTED = ATTENTION | SOFTMAX | {F.multi_head_attention_forward}
_BUILT_IN = tuple(
    f"torch.nn.modules.{kind}" for kind in ("linear", "conv", "normalization", "dropout", "batchnorm", "pooling")
)
_NEVER = nn.Softmax, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase  # not hooked, nor their subclasses
_ACTIVATIONS = frozenset({nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU})


_surveying = threading.local()


def surveys() -> int:
    """Return how many nested surveys are running in this thread."""
    depth: int = getattr(_surveying, "depth", 0)
    return depth


@contextlib.contextmanager
def hidden_from_watchers() -> Iterator[None]:
    """Hide the model's calls in this context from watchers that started before it."""
    before = surveys()
    _surveying.depth = before + 1
    try:
        yield
    finally:
        _surveying.depth = before


_in_multi_head = threading.local()
"""`.watchers`: this thread's watchers that handle a call of `F.multi_head_attention_forward`, outermost at the end."""


_active = threading.local()
"""`.watchers`: the active watchers of this thread, outermost first."""


class _Shared:
    """A change to the whole process: the first user in any thread makes the change, and the last user undoes it."""

    def __init__(self, change: Callable[[contextlib.ExitStack], None]) -> None:
        self._change = change
        self._lock = threading.Lock()
        self._users = 0
        self._undo = contextlib.ExitStack()

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._change(self._undo)
            self._users += 1

    def __exit__(
        self,
        kind: type[BaseException] | None = None,
        error: BaseException | None = None,
        trace: TracebackType | None = None,
    ) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo.close()


def _stay_in_python(undo: contextlib.ExitStack) -> None:
    """Turn off fused transformer layers, compiled code and sparse attention.

    Fused layers and compiled code call no function of torch that a watcher could intercept. Sparse attention is
    computed in parts, so no call has a whole row of weights.
    """
    undo.callback(setattr, MaskedAttention, "attend", MaskedAttention.attend)
    setattr(MaskedAttention, "attend", MaskedAttention.dense)  # noqa: B010 - mypy takes no assignment to a method
    undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)
    if "torch._dynamo" in sys.modules:  # otherwise nothing is compiled
        undo.enter_context(torch.compiler.set_stance("force_eager"))


def _intercept_global_names(undo: contextlib.ExitStack) -> None:
    for name, event in (("scaled_dot_product_attention", "fused"), ("softmax", "softmax")):
        original = getattr(F, name)
        undo.callback(setattr, F, name, original)
        setattr(F, name, functools.partial(_call_through_watchers, original, event))


def _intercept_looks(undo: contextlib.ExitStack) -> None:
    original = Retina.look

    def look(retina: Retina, view: View, location_BR2: Tensor) -> Tensor:
        """`Retina.look` that also calls the watchers of this thread."""
        call: Callable[[View, Tensor], Tensor] = functools.partial(original, retina)
        for watcher in getattr(_active, "watchers", ()):
            if watcher.is_active_for(retina):
                call = functools.partial(watcher.looked, retina, call)
        return call(view, location_BR2)

    undo.callback(setattr, Retina, "look", original)
    setattr(Retina, "look", look)  # noqa: B010 - mypy takes no assignment to a method


in_python = _Shared(_stay_in_python)
"""A context without fused layers, compiled code and sparse attention, so that hooks and watchers catch every call."""

_intercepted_names = _Shared(_intercept_global_names)

# no hook runs when the method `look` is called, so the method itself is replaced
_intercepted_looks = _Shared(_intercept_looks)


def _call_through_watchers(original: Func, event: str, *args: object, **kwargs: object) -> object:
    """Call `original` through the watchers of this thread: each calls the next one, and the last calls `original`."""
    call = original
    for watcher in getattr(_in_multi_head, "watchers", ()):
        call = functools.partial(_call_event, getattr(watcher, event), call)
    return call(*args, **kwargs)


def _call_event(event: Func, func: Func, *args: object, **kwargs: object) -> object:
    called: object = event(func, args, kwargs)
    return called


class Watcher(TorchFunctionMode):
    """Base class of contexts that follow a running model. Subclasses define what happens at each event.

    Attributes:
        stack: names of the modules that are running, outermost first.
        follows: whether `other` is called for every function of torch.
    """

    follows = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self._thread = threading.get_ident()
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    # Events ---------------------------------------------------------------------------------------------------------

    def begin(self, module: nn.Module, args: Args, kwargs: Kwargs) -> None:
        """Handle the start of the outermost module: a call of the model."""

    def end(self) -> None:
        """Handle the return of the outermost module."""

    def enter(self, name: str, module: nn.Module) -> None:
        """Handle the start of a module."""

    def leave(self, name: str, module: nn.Module, args: Args, kwargs: Kwargs, out: object) -> object:
        """Handle the return of a module. The result replaces the output `out`, unless it is None."""

    def fused(self, func: Func, args: Args, kwargs: Kwargs) -> object:
        """Run `F.scaled_dot_product_attention`, and return its result."""
        return func(*args, **kwargs)

    def softmax(self, func: Func, args: Args, kwargs: Kwargs) -> object:
        """Run a softmax, and return its result."""
        return func(*args, **kwargs)

    def other(self, func: Func, args: Args, kwargs: Kwargs) -> object:
        """Run another function of torch, and return its result. Called only if `follows` is true."""
        return func(*args, **kwargs)

    def looked(
        self, retina: Retina, look: Callable[[View, Tensor], Tensor], view: View, location_BR2: Tensor
    ) -> Tensor:
        """Run a retina's look at some locations, and return the patches."""
        return look(view, location_BR2)

    def watched(self, module: nn.Module) -> bool:
        """Return whether to call `enter` and `leave` for a module.

        Hooks cost time, and most leaf modules of torch.nn need none.
        """
        if type(module) in _ACTIVATIONS:
            return self.names[module].rpartition(".")[2] == "gate"
        return not isinstance(module, _NEVER) and not type(module).__module__.startswith(_BUILT_IN)

    # Machinery ------------------------------------------------------------------------------------------------------

    @property
    def _ignores_calls(self) -> bool:
        """Whether calls are ignored: those of other threads, and those of surveys that began after this watcher."""
        return surveys() != self._depth or threading.get_ident() != self._thread

    def is_active_for(self, retina: Retina) -> bool:
        """Return whether this retina is part of the model and the watcher is active."""
        return retina in self.names and not self._ignores_calls

    @property
    def where(self) -> str:
        """Name of the innermost module that is executing."""
        return self.stack[-1] if self.stack else ""

    def __torch_function__(self, func: Func, types: object, args: Args = (), kwargs: Kwargs | None = None) -> object:
        kwargs = kwargs or {}
        if (func not in _INTERCEPTED and not self.follows) or not self.stack or self._ignores_calls:
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
        """Replace functions in `F` to catch inner calls: torch turns a mode off while the mode handles a function."""
        before = getattr(_in_multi_head, "watchers", ())
        with _intercepted_names:
            _in_multi_head.watchers = (*before, self)
            try:
                yield
            finally:
                _in_multi_head.watchers = before

    def __enter__(self) -> "Self":
        self._depth = surveys()
        in_python.__enter__()
        for module in self.names:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # a scripted module takes no hooks, and calls no function of torch
            if module is self.model or self.watched(module):
                self._handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                    module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
                ]
        _intercepted_looks.__enter__()
        _active.watchers = (*getattr(_active, "watchers", ()), self)
        TorchFunctionMode.__enter__(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        TorchFunctionMode.__exit__(self, kind, error, trace)
        _active.watchers = tuple(watcher for watcher in _active.watchers if watcher is not self)
        _intercepted_looks.__exit__()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.stack.clear()
        in_python.__exit__()

    # While one thread registers a hook with keyword arguments, torch may call it in other threads without them. So the
    # hooks take any arguments, and read them only in their own thread.

    def _enter(self, module: nn.Module, *given: Any) -> None:
        if self._ignores_calls:
            return
        args, kwargs = given
        if not self.stack:
            self.begin(module, args, kwargs)
        self.stack.append(self.names[module])
        self.enter(self.stack[-1], module)

    def _leave(self, module: nn.Module, *given: Any) -> object:
        if self._ignores_calls or not self.stack:
            return None
        args, kwargs, out = given
        name = self.stack.pop()
        try:
            return None if out is None else self.leave(name, module, args, kwargs, out)
        finally:
            if not self.stack:
                self.end()


def gate_of(
    name: str, module: nn.Module, out: object, *, along_row: bool
) -> tuple[Literal["channel_gate", "spatial_gate"], Tensor] | None:
    """Return the kind and the weights (B, C, h, w) of a gate, given a module's output; None if it is not a gate.

    A gate is the output of a module called `gate` (in timm and visionattn) or `scale_activation` (in torchvision), or
    the output of a sigmoid with one value for each channel or one for each position.

    Args:
        name: dotted name of the module.
        module: the module.
        out: its output.
        along_row: whether the last axis of an output (B, 1, 1, W) runs over the columns of the image, so that the
            output is a gate over positions. Otherwise the axis runs over channels. The survey finds this out.
    """
    leaf = name.rpartition(".")[2]
    named = leaf in ("gate", "scale_activation")
    if not (named or "sigmoid" in type(module).__name__.lower()) or not isinstance(out, Tensor):
        return None
    if out.ndim == 3 and out.shape[1] == 1 and named:  # ECA gates (B, 1, C)
        out = out.transpose(1, 2)[..., None]
    if out.ndim != 4:
        return None
    if out.shape[1:3] == (1, 1) and out.shape[3] > 1 and not along_row:  # channels last
        out = out.permute(0, 3, 1, 2)
    if out.shape[2:] == (1, 1):
        return "channel_gate", out
    if named or out.shape[1] == 1:
        return "spatial_gate", out
    return None
