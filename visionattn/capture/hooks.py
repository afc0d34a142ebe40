"""Stand beside a model while it runs: which module is at work, and which functions it calls.

Nothing is put into the model but forward hooks, and those are gone when the context ends, after an exception too.
"""

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from visionattn.attention.hard.retina import Retina, View
from visionattn.attention.self_attention.dense import MaskedAttention

if TYPE_CHECKING:
    from typing_extensions import Self

ATTENTION = frozenset({F.scaled_dot_product_attention})
SOFTMAX = frozenset({F.softmax, torch.softmax, torch.Tensor.softmax, torch.special.softmax})
_HEARD = ATTENTION | SOFTMAX | {F.multi_head_attention_forward}
_BUILT_IN = tuple(
    f"torch.nn.modules.{kind}" for kind in ("linear", "conv", "normalization", "dropout", "batchnorm", "pooling")
)
_NEVER = nn.Softmax, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase  # nor do what others made of these
_ACTIVATIONS = frozenset({nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Hardswish, nn.LeakyReLU})


_surveying = threading.local()


def surveys() -> int:
    """How many surveys are under way in this thread, one inside the other."""
    return getattr(_surveying, "depth", 0)


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Let a model run without any watcher that is on duty hearing of it, but for those that start inside."""
    before = surveys()
    _surveying.depth = before + 1
    try:
        yield
    finally:
        _surveying.depth = before


_inside = threading.local()
"""`.watchers`: those of this thread inside whose `F.multi_head_attention_forward` it is, outermost last."""


_duty = threading.local()
"""`.watchers`: those of this thread that hear of looks, outermost last."""


class _Shared:
    """A change to the whole process, made when the first in any thread wants it and undone when the last is through."""

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

    def __exit__(self, *error: Any) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._undo.close()


def _stay_in_python(undo: contextlib.ExitStack) -> None:
    """Where attention happens inside one opaque kernel, and where code is compiled, no function of torch is called;
    where it happens in parts, no call has all of a row."""
    undo.callback(setattr, MaskedAttention, "attend", MaskedAttention.attend)
    setattr(MaskedAttention, "attend", MaskedAttention.dense)  # noqa: B010 - mypy takes no assignment to a method
    undo.callback(torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled())
    torch.backends.mha.set_fastpath_enabled(False)
    if "torch._dynamo" in sys.modules:  # else nothing is compiled
        undo.enter_context(torch.compiler.set_stance("force_eager"))


def _hear_global_names(undo: contextlib.ExitStack) -> None:
    for name, event in (("scaled_dot_product_attention", "fused"), ("softmax", "softmax")):
        original = getattr(F, name)
        undo.callback(setattr, F, name, original)
        setattr(F, name, functools.partial(_heard, original, event))


def _hear_looks(undo: contextlib.ExitStack) -> None:
    original = Retina.look

    def look(retina: Retina, view: View, location_BR2: Tensor) -> Tensor:
        """`Retina.look`, told to the watchers of this thread."""
        call: Callable[[View, Tensor], Tensor] = functools.partial(original, retina)
        for watcher in getattr(_duty, "watchers", ()):
            if watcher.hears(retina):
                call = functools.partial(watcher.looked, retina, call)
        return call(view, location_BR2)

    undo.callback(setattr, Retina, "look", original)
    setattr(Retina, "look", look)  # noqa: B010 - mypy takes no assignment to a method


in_python = _Shared(_stay_in_python)
"""Inside, nothing happens in opaque kernels, compiled code or parts, so that every hook and function is met."""

_names = _Shared(_hear_global_names)

_looks = _Shared(_hear_looks)  # a look is a method of the retina and no call of a module, which a hook would meet


def _heard(original: Callable[..., Any], event: str, *args: Any, **kwargs: Any) -> Any:
    """Tell the watchers of this thread, the outermost first, whose call of `original` in turn reaches the next."""
    call = original
    for watcher in getattr(_inside, "watchers", ()):
        call = functools.partial(_tell, getattr(watcher, event), call)
    return call(*args, **kwargs)


def _tell(event: Callable[..., Any], func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return event(func, args, kwargs)


class Watcher(TorchFunctionMode):
    """Follows a running model; subclasses say what they do at each event.

    Attributes:
        stack: names of the modules at work, outermost first.
        follows: whether `other` hears of every function of torch.
    """

    follows = False

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.names = {module: name for name, module in model.named_modules()}
        self.stack: list[str] = []
        self._thread = threading.get_ident()
        self._depth = 0
        self._handles: list[Any] = []

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
        """Another function of torch is called; heard of only where `follows`."""
        return func(*args, **kwargs)

    def looked(
        self, retina: Retina, look: Callable[[View, Tensor], Tensor], view: View, location_BR2: Tensor
    ) -> Tensor:
        """A retina of the model looks at places of the images."""
        return look(view, location_BR2)

    def watched(self, module: nn.Module) -> bool:
        """Whether to hear of this module's start and end, which costs time; leaves of torch.nn do not attend."""
        if type(module) in _ACTIVATIONS:
            return self.names[module].rpartition(".")[2] == "gate"
        return not isinstance(module, _NEVER) and not type(module).__module__.startswith(_BUILT_IN)

    # Machinery ------------------------------------------------------------------------------------------------------

    @property
    def _deaf(self) -> bool:
        return surveys() != self._depth or threading.get_ident() != self._thread

    def hears(self, retina: Retina) -> bool:
        """Whether this retina is the model's, and now to be heard."""
        return retina in self.names and not self._deaf

    @property
    def where(self) -> str:
        """Name of the innermost module at work."""
        return self.stack[-1] if self.stack else ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (func not in _HEARD and not self.follows) or not self.stack or self._deaf:
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
        """The mode is off inside a function that it handles; hear the inner calls by their global names."""
        before = getattr(_inside, "watchers", ())
        with _names:
            _inside.watchers = (*before, self)
            try:
                yield
            finally:
                _inside.watchers = before

    def __enter__(self) -> "Self":
        self._depth = surveys()
        in_python.__enter__()
        for module in self.names:
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks, and calls no function of torch
            if module is self.model or self.watched(module):
                self._handles += [
                    module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True),
                    module.register_forward_hook(self._leave, with_kwargs=True, always_call=True),
                ]
        _looks.__enter__()
        _duty.watchers = (*getattr(_duty, "watchers", ()), self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        _duty.watchers = tuple(watcher for watcher in _duty.watchers if watcher is not self)
        _looks.__exit__()
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self.stack.clear()
        in_python.__exit__()

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


def gate_of(
    name: str, module: nn.Module, out: Any, *, along_row: bool
) -> tuple[Literal["channel_gate", "spatial_gate"], Tensor] | None:
    """Tell whether a module's output is a gate, and of what kind.

    A gate is what a module called `gate` (timm and ours) or `scale_activation` (torchvision) returns, or a sigmoid over
    a whole channel or a whole position.

    Args:
        along_row: the last axis runs over positions, as a survey found: (B, 1, 1, W) is a gate over columns then, and
            over channels that come last otherwise.
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
