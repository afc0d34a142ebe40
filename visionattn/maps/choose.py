"""Which method to take where nobody says."""

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention.glimpse import Retina
from visionattn.attention.places import image_shape
from visionattn.errors import UsageError, nearest
from visionattn.maps.attention_methods import DinoHeads, RawAttention, ValueNorm
from visionattn.maps.base import Method, undisturbed
from visionattn.maps.cam import EigenCAM, GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
from visionattn.maps.fitting import names_that_fit
from visionattn.maps.gates import Gate
from visionattn.maps.gaze import Gaze
from visionattn.maps.relevance import Chefer, GradientAttention, GradientRollout
from visionattn.maps.rollout import Rollout
from visionattn.maps.running import look

METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        RawAttention,
        DinoHeads,
        ValueNorm,
        Rollout,
        GradientAttention,
        GradientRollout,
        Chefer,
        Gate,
        Gaze,
        GradCAM,
        GradCAMPlusPlus,
        LayerCAM,
        EigenCAM,
        ScoreCAM,
    )
}
"""Name on the command line → class."""


def default_method(model: nn.Module, images_BCHW: Tensor | None = None) -> Method:
    """Choose a method: gaze where a retina looks, raw attention where class tokens or learned queries read the grid
    last, else Grad-CAM.

    Args:
        model: any vision model.
        images_BCHW: an example of its input; without one, an image of the size the model was configured for.
    """
    with undisturbed(model) as bare:
        if any(isinstance(module, Retina) for module in bare.modules()):
            return Gaze()
        sites = look(bare, example(bare) if images_BCHW is None else images_BCHW[:1]).attention
    if sites and sites[-1].class_query is not None and not sites[-1].context and not sites[-1].windowed:
        return RawAttention()
    return GradCAM()


def method_of(name: str | None, layer: int | str | None, model: nn.Module, images_BCHW: Tensor | None = None) -> Method:
    """The method of a name, at a layer.

    Args:
        name: in `METHODS`; None for `default_method`.
        layer: the name of a module, or its place in the order, which may be written in digits; None for the method's
            own choice.
        model, images_BCHW: as `default_method`.

    Raises:
        UsageError: there is no such method, or it takes no layer, or none by its place.
    """
    if name is not None and name not in METHODS:
        raise UsageError(f"there is no method {name!r}.{nearest(name, METHODS)} All: {', '.join(METHODS)}.")
    if name is None and layer is None:
        return default_method(model, images_BCHW)
    kind = METHODS[name] if name else type(default_method(model, images_BCHW))
    return at_layer(kind, layer)


def at_layer(kind: Any, layer: int | str | None) -> Any:
    """A method of some kind at a layer, as `method_of` takes it."""
    if layer is None:
        return kind()
    parameters = inspect.signature(kind).parameters
    if "layer" not in parameters:
        raise UsageError(f"{kind.name} combines all layers and takes no layer")
    if "int" in str(parameters["layer"].annotation):
        layer = int(layer) if re.fullmatch(r"-?\d+", str(layer)) else layer
    elif isinstance(layer, int):
        raise UsageError(f"{kind.name} takes the name of a layer, not its place {layer}")
    return kind(layer=layer)


def methods_that_fit(model: nn.Module, images_BCHW: Tensor) -> dict[str, Method]:
    """All methods that fit a model, as they are by default, but Score-CAM, which takes a forward pass a channel."""
    with undisturbed(model) as bare:
        names = names_that_fit(look(bare, images_BCHW[:1]))
    return {name: METHODS[name]() for name in names if METHODS[name] is not ScoreCAM}


def example(model: nn.Module) -> Tensor:
    """Make a grey image of the size that a model was configured for, 224 × 224 unless it says."""
    like = next(model.parameters(), torch.zeros(()))
    return torch.zeros(1, *image_shape(model), device=like.device, dtype=like.dtype)
