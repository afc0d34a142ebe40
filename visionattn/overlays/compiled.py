"""Compile the parts of a model that nobody watches.

Attention, gates and the layer of a class activation map are watched from Python, by functions and hooks, and stay as
they are. The largest modules around which nothing is watched, as the MLPs of a transformer or the stages of a
convolutional network before the last, run as compiled copies that share their weights, but where gradients are wanted.
"""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.capture.running import look, undisturbed, unwrap
from visionattn.errors import MapWarning, UsageError
from visionattn.maps.method import Maps


@contextlib.contextmanager
def compiled(
    model: nn.Module, method: Callable[..., Maps], images_BCHW: Tensor, *, backend: str = "inductor"
) -> Iterator[list[str]]:
    """Inside, a model's unwatched parts are compiled; yields their names. On leaving it is as it was.

    Args:
        method: whose watching is to go on as before.
        images_BCHW: an example of what the model gets.
        backend: of `torch.compile`.

    Raises:
        UsageError: the model picks tokens by what an image shows, nothing is left to compile, or there is no compiler.
    """
    bare = unwrap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # of an image that shows nothing
        source = method(model, images_BCHW).source  # surveys the model, which cannot be done once parts are compiled
        with undisturbed(model):
            found = look(bare, images_BCHW)
        if found.picks:
            raise UsageError("a model that picks tokens by what an image shows is watched all over; leave compile out")
        parts = _unwatched(bare, {name for name, _ in found.sites}, {*found.gates, source})
        if not parts:
            raise UsageError(
                "all of this model is watched by the method, so nothing can be compiled; leave compile out"
            )
        try:
            for part in parts.values():
                part.forward = _quick(part, backend)
            try:
                method(model, images_BCHW)
            except torch._dynamo.exc.BackendCompilerFailed as error:
                reason = str(error).strip().split("\n")[0]
                raise UsageError(f"the model cannot be compiled here ({reason}); leave compile out") from error
            yield list(parts)
        finally:
            for part in parts.values():
                part.__dict__.pop("forward", None)


def _unwatched(model: nn.Module, attending: set[str], watched: set[str]) -> dict[str, nn.Module]:
    """The largest modules that hold more than one other, neither attend nor lie inside of what does, and hold nothing
    watched."""
    parts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{part}.") for part in parts):
            continue
        near = any(other == name or other.startswith(f"{name}.") for other in attending | watched)
        inside = any(name.startswith(f"{other}.") for other in attending)
        if not near and not inside and len(list(module.children())) > 1:
            parts[name] = module
    return parts


def _quick(part: nn.Module, backend: str) -> Callable[..., Any]:
    shared = {id(tensor): tensor for tensor in itertools.chain(part.parameters(), part.buffers())}
    twin = torch.compile(copy.deepcopy(part, shared), backend=backend)  # no watcher puts its hooks into this one
    plain = part.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():  # the little that comes after a layer whose gradient is wanted
            return plain(*args, **kwargs)
        with torch.compiler.set_stance("default"), torch._C.DisableTorchFunction():
            return twin(*args, **kwargs)

    return forward
