"""Choose a heatmap method by its name, the default method of a model, or every method that fits a model."""

import torch
from torch import Tensor, nn

from visionattn.attention import Retina
from visionattn.capture import Survey, survey_images, undisturbed
from visionattn.data import image_shape
from visionattn.errors import UsageError, nearest
from visionattn.maps.method import Method, at_layer, methods

METHODS: dict[str, type[Method]] = methods()
"""Name on the command line → class, ordered by needs, cost and name."""


def default_method(model: nn.Module, images_BCHW: Tensor | None = None) -> Method:
    """Choose the default heatmap method of a model.

    The default is the first method of `METHODS` whose `is_default` is true: `Gaze` for a model with a `Retina`,
    `RawAttention` if class tokens or learned queries attend to the grid in the last layer of attention, else `GradCAM`.

    Args:
        model: any vision model.
        images_BCHW: an example of its input (default: a grey image of the size that the model was configured for).
    """
    with undisturbed(model) as bare:
        survey = Survey(glimpses=[name for name, part in bare.named_modules() if isinstance(part, Retina)])
        if not survey.glimpses:  # a network with a retina declares no number of channels, so an example may not fit it
            survey = survey_images(bare, example(bare) if images_BCHW is None else images_BCHW[:1])
    return next(kind for kind in METHODS.values() if kind.is_default(survey))()


def make_method(
    name: str | None, layer: int | str | None, model: nn.Module, images_BCHW: Tensor | None = None
) -> Method:
    """Create a method from its name, for one layer.

    Args:
        name: a key of `METHODS`; None for the default method of the model.
        layer: name of a module, or its index among the modules that the method uses (an int or a string of digits);
            None for the default layer of the method.
        model, images_BCHW: as for `default_method`.

    Raises:
        UsageError: there is no such method, the method takes no layer, or the method takes only the name of a layer.
    """
    if name is not None and name not in METHODS:
        raise UsageError(f"there is no method {name!r}.{nearest(name, METHODS)} All: {', '.join(METHODS)}.")
    if name is None and layer is None:
        return default_method(model, images_BCHW)
    kind = METHODS[name] if name else type(default_method(model, images_BCHW))
    return at_layer(kind, layer)


def methods_that_fit(model: nn.Module, images_BCHW: Tensor) -> dict[str, Method]:
    """Make every method that fits a model, with default arguments: name → method.

    Methods that need one forward pass per channel (Score-CAM) are left out.

    Args:
        model: any vision model.
        images_BCHW: an example of its input.
    """
    with undisturbed(model) as bare:
        survey = survey_images(bare, images_BCHW[:1])
    return {
        name: kind() for name, kind in METHODS.items() if kind.fits(survey) and kind.cost != "a forward pass a channel"
    }


def example(model: nn.Module) -> Tensor:
    """Return a grey image (1, C, H, W) of the size that a model was configured for (default: 224 × 224)."""
    like = next(model.parameters(), torch.zeros(()))
    return torch.zeros(1, *image_shape(model), device=like.device, dtype=like.dtype)
