"""Choose a heatmap method by its name, the default method of a model, or every method that fits a model."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from visionattn.attention import Retina
from visionattn.capture import Survey, survey_images, undisturbed
from visionattn.data import image_shape
from visionattn.errors import UsageError, nearest
from visionattn.maps.method import Cost, Method, at_layer, methods
from visionattn.maps.methods.rollout import chain_caveats

METHODS: dict[str, type[Method]] = methods()
"""Name on the command line → class, ordered by needs, cost and name."""
_NOTES = {
    "gradcam": "at the last block, gradcam did not beat every control on networks of this kind; try an early layer, "
    "e.g. layercam@LAYER, and compare with visionattn score",
}

_FAST: tuple[Cost, ...] = ("a forward pass", "a forward and a backward pass")


def default_method(model: nn.Module, images_BCHW: Tensor | None = None) -> Method:
    """Choose the default heatmap method of a model, see `default_name`.

    Args:
        model: any vision model.
        images_BCHW: an example of its input (default: a grey image of the size that the model was configured for).
    """
    with undisturbed(model) as bare:
        survey = Survey(glimpses=[name for name, part in bare.named_modules() if isinstance(part, Retina)])
        if not survey.glimpses:  # for glimpses, no image is needed: a retina does not say how many channels it needs
            survey = survey_images(bare, example(bare) if images_BCHW is None else images_BCHW[:1])
        # what has no weights, such as a normaliser of images in front of a ViT, says nothing of the kind of network
        learned = {name for name, part in bare.named_modules() if next(part.parameters(), None) is not None}
        survey = replace(survey, activations=[found for found in survey.activations if found.name in learned])
    return METHODS[default_name(survey)]()


def default_name(survey: Survey) -> str:
    """Return the name of the default method of a model, from what was found in the model.

    The choice follows from images whose evidence is known (`tests/benchmarks/judge.py`, and its table in the README of
    `evaluation`) and from the cost; "Which method?" in the README of `maps` explains it.

    - `gaze` for a model with a retina.
    - `rollout` if class tokens or learned queries read the grid in the last of several layers of attention, and all
      layers attend to the same tokens.
    - `rollout` also without class tokens, if the attention starts at the patches, with no convolution on a finer grid;
      layers may attend in windows, though rollout is approximate there, and warns.
    - `raw` if class tokens or learned queries read the grid, but there is a single layer, or layers pool patches.
    - `gradcam` for all other models. If Grad-CAM does not fit, its error names the methods that fit.
    """
    if survey.glimpses:
        return "gaze"
    sites = survey.attention
    reads = bool(sites) and sites[-1].reads_the_grid
    if len(sites) > 1 and not survey.unlabelled:
        same_tokens = not chain_caveats(survey)
        windowed = any(site.windowed for site in sites)
        if (reads and same_tokens) or (not reads and (windowed or same_tokens) and _starts_at_patches(survey)):
            return "rollout"
    return "raw" if reads else "gradcam"


def _starts_at_patches(survey: Survey) -> bool:
    """Return whether the first attention has the finest grid of the model, so that no convolution is before it."""
    finest = max((activation.tokens.grid for activation in survey.activations), key=_cells, default=(0, 0))
    return max(_cells(site.grid) for site in survey.attention) >= _cells(finest)


def _cells(grid: tuple[int, ...]) -> int:
    return grid[0] * grid[1]


def default_note(name: str) -> str:
    """Return what a user should know about a default method of this name, as a sentence without its full stop.

    The sentence is empty if the method has no such note.
    """
    return _NOTES.get(name, "")


def make_method(
    name: str | None, layer: int | str | None, model: nn.Module, images_BCHW: Tensor | None = None
) -> Method:
    """Create a method from its name, for one layer.

    Args:
        name: a key of `METHODS`; None for the default method of the model. With a layer, `raw` takes the place of
            `rollout`, which has no layer.
        layer: name of a module, or its index among the modules that the method uses (an int or a string of digits);
            None for the default layer of the method.
        model, images_BCHW: as for `default_method`.

    Raises:
        UsageError: there is no such method, or it cannot use the layer: some methods take none, others only a name.
    """
    if name is not None and name not in METHODS:
        raise UsageError(f"there is no method {name!r}.{nearest(name, METHODS)} All: {', '.join(METHODS)}.")
    if name is None and layer is None:
        return default_method(model, images_BCHW)
    if name is None:
        name = default_method(model, images_BCHW).name
        name = "raw" if name == "rollout" else name
    return at_layer(METHODS[name], layer)


def methods_that_fit(model: nn.Module, images_BCHW: Tensor) -> dict[str, Method]:
    """Make every fast method that fits a model, with default arguments: name → method.

    Methods that cost more than a forward and a backward pass are left out.

    Args:
        model: any vision model.
        images_BCHW: an example of its input.
    """
    with undisturbed(model) as bare:
        survey = survey_images(bare, images_BCHW[:1])
    return {name: kind() for name, kind in METHODS.items() if kind.cost in _FAST and kind.fits(survey)}


def example(model: nn.Module) -> Tensor:
    """Return a grey image (1, C, H, W) of the size that a model was configured for (default: 224 × 224)."""
    like = next(model.parameters(), torch.zeros(()))
    return torch.zeros(1, *image_shape(model), device=like.device, dtype=like.dtype)
