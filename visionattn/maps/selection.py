"""Which method to take where nobody says."""

import torch
from torch import Tensor, nn

from visionattn.attention.hard.retina import Retina
from visionattn.capture.running import look, undisturbed
from visionattn.data.placement import image_shape
from visionattn.errors import UsageError, nearest
from visionattn.maps.cam import EigenCAM, GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM
from visionattn.maps.fitting import names_that_fit
from visionattn.maps.gates import Gate
from visionattn.maps.gaze import Gaze
from visionattn.maps.method import Method, at_layer
from visionattn.maps.transformers.gradient_attention import GradientAttention
from visionattn.maps.transformers.raw import DinoHeads, RawAttention, ValueNorm
from visionattn.maps.transformers.relevance import Chefer, GradientRollout
from visionattn.maps.transformers.rollout import Rollout

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


def methods_that_fit(model: nn.Module, images_BCHW: Tensor) -> dict[str, Method]:
    """All methods that fit a model, as they are by default, but Score-CAM, which takes a forward pass a channel."""
    with undisturbed(model) as bare:
        names = names_that_fit(look(bare, images_BCHW[:1]))
    return {name: METHODS[name]() for name in names if METHODS[name] is not ScoreCAM}


def example(model: nn.Module) -> Tensor:
    """Make a grey image of the size that a model was configured for, 224 × 224 unless it says."""
    like = next(model.parameters(), torch.zeros(()))
    return torch.zeros(1, *image_shape(model), device=like.device, dtype=like.dtype)
