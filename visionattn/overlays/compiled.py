"""Compile the parts of a model that the heatmap method does not watch.

Python functions and hooks watch attention, gates and the layer of a class activation map, so these cannot be compiled.
The largest other modules run as compiled copies that share the weights: for example the MLPs of a transformer, or the
stages of a convolutional network before the last. Passes that need gradients use the original modules.
"""

import contextlib
import copy
import itertools
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from visionattn.capture import survey_images, undisturbed, unwrap
from visionattn.errors import MapWarning, UsageError
from visionattn.maps import Heatmaps


@contextlib.contextmanager
def compiled(
    model: nn.Module, method: Callable[..., Heatmaps], images_BCHW: Tensor, *, backend: str = "inductor"
) -> Iterator[list[str]]:
    """Compile a model's unwatched parts inside the `with` block; restore the model on exit.

    Args:
        model: any vision model.
        method: the heatmap method; its results do not change.
        images_BCHW: an example of the model's input.
        backend: of `torch.compile`.

    Yields:
        The names of the compiled modules.

    Raises:
        UsageError: the model selects tokens by the content of the image, the method watches the whole model, or there
            is no compiler.
    """
    bare = unwrap(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # the heatmap of the example may be constant
        source = method(model, images_BCHW).source  # also surveys the model: impossible once parts are compiled
        with undisturbed(model):
            survey = survey_images(bare, images_BCHW)
        if survey.picks:
            raise UsageError(
                "a model that selects tokens by the content of the image is watched in every block, so nothing can be "
                "compiled; leave compile out"
            )
        parts = _unwatched(bare, {name for name, _ in survey.sites}, {*survey.gates, source})
        if not parts:
            raise UsageError("the method watches all of this model, so nothing can be compiled; leave compile out")
        try:
            for part in parts.values():
                part.forward = _compiled_forward(part, backend)
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
    """Return the largest modules that can be compiled: name → module.

    They have several children, contain no module that attends or is watched, and are not inside a module that attends.
    """
    parts: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not name or any(name.startswith(f"{part}.") for part in parts):
            continue
        contains = any(other == name or other.startswith(f"{name}.") for other in attending | watched)
        inside = any(name.startswith(f"{other}.") for other in attending)
        if not contains and not inside and len(list(module.children())) > 1:
            parts[name] = module
    return parts


def _compiled_forward(part: nn.Module, backend: str) -> Callable[..., object]:
    """Return a forward function that runs a compiled copy of a module, which shares its weights."""
    shared: dict[int, object] = {id(tensor): tensor for tensor in itertools.chain(part.parameters(), part.buffers())}
    twin = torch.compile(copy.deepcopy(part, shared), backend=backend)  # methods put no hooks into the copy
    plain = part.forward

    def forward(*args: object, **kwargs: object) -> object:
        if torch.is_grad_enabled():  # only after the layer for which a method needs a gradient
            return plain(*args, **kwargs)
        with torch.compiler.set_stance("default"), torch._C.DisableTorchFunction():
            return twin(*args, **kwargs)

    return forward
