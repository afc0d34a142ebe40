"""Heatmaps of single images, for notebooks and scripts: one call from a model and a picture to the picture that shows
where the model looked. Folders go by `overlay.export.export`, which reads ahead, keeps a manifest and goes on.

Shapes: B images, C channels, H × W pixels of a picture, h × w grid of the model.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from visionattn.data.decode import encode_image, read_image, upright, write_image
from visionattn.data.placement import Placement, Preprocess
from visionattn.drawing.rendering import Style, peak
from visionattn.drawing.resizing import shrink
from visionattn.errors import UsageError
from visionattn.maps.method import Method
from visionattn.overlays import outputs
from visionattn.overlays.explainer import Explain, View, known_of, looks_of, method_for, predictions_of
from visionattn.overlays.outputs import Look, Scene

Picture: TypeAlias = str | bytes | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor
"""A file, a PIL image, (H, W, 3) uint8 RGB, or (C, H, W) as the model takes it."""

Target: TypeAlias = int | str | Sequence[int] | Tensor | Callable[[Any], Tensor] | None

_SHOWN = 768  # pixels of the longer side in a notebook: a photograph at its full size would make the notebook huge


@dataclass(frozen=True, eq=False, repr=False)
class Heatmap:
    """Where a model looked in a picture; the last expression of a notebook's cell shows it.

    Attributes:
        image: (H, W, 3) uint8 RGB, the source.
        method: name of the method.
        source: what is shown, e.g. `"gate of layer4.1"`.
        target: the output that is explained; None where the method explains none in particular.
        prediction: the model's likeliest class; None where the model is no classifier.
        class_name: what that class is called; None where that is not known.
        probability: of that class, by softmax.
        look: the heatmap on the model's grid (`heatmap_hw`), and where it lies in the picture (`placement`).
    """

    image: NDArray[np.uint8]
    method: str
    source: str
    target: int | None
    prediction: int | None
    class_name: str | None
    probability: float | None
    look: Look

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """The heat of every pixel of the source, (H, W) in [0, 1]; 0 where the model saw nothing."""
        return self.look.placement.carry(self.look.heatmap_hw)

    @property
    def peak(self) -> tuple[float, float] | None:
        """Where it is hottest, (x, y) in pixels of the source; None where it is constant."""
        return peak(self.look.heatmap_hw, self.look.placement)

    def overlay(
        self,
        *,
        colormap: str = Style.colormap,
        alpha: float = Style.alpha,
        saturation: float = Style.saturation,
        contours: Sequence[float] = (),
        caption: bool = False,
    ) -> NDArray[np.uint8]:
        """Lay the heatmap over the picture; what the model did not see is dark.

        Args:
            colormap: inferno, magma, plasma, viridis, cividis, turbo or bone.
            alpha: opacity where the heatmap is hottest, in [0, 1].
            saturation: share of the picture's own colour that is kept, in [0, 1].
            contours: levels in (0, 1] whose lines are drawn as well.
            caption: whether the prediction is written into it.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            UsageError: there is no such colormap, or a number is out of its range.
        """
        style = Style(colormap, alpha, saturation, tuple(contours), caption=caption)
        return outputs.overlay(Scene(self.image, [self.look], style))

    def save(self, path: "str | bytes | os.PathLike[str]") -> None:
        """Write the overlay as .jpg, .png or .webp, at the size of the source.

        Raises:
            DataError: the folder is missing, the disk is full, or the suffix is no image's.
        """
        write_image(path, self.overlay())

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        parts = [f"{self.method} of {self.source}", f"{width} × {height}"]
        parts += [self.look.said] if self.look.said else []
        parts += ["constant" if self.peak is None else f"hottest at ({self.peak[0]:.0f}, {self.peak[1]:.0f})"]
        return f"Heatmap({', '.join(parts)})"

    def _repr_png_(self) -> bytes:
        return encode_image(shrink(self.overlay(), _SHOWN), ".png")


_Single: TypeAlias = str | bytes | os.PathLike[str] | Image.Image


@overload
def heatmap(  # type: ignore[overload-overlap]  # a string is a sequence of strings, too
    model: nn.Module,
    image: _Single,
    *,
    method: str | Method | None = ...,
    layer: int | str | None = ...,
    target: Target = ...,
    preprocess: Preprocess | None = ...,
    class_names: Sequence[str] = ...,
) -> Heatmap: ...


@overload
def heatmap(
    model: nn.Module,
    image: Sequence[Picture],
    *,
    method: str | Method | None = ...,
    layer: int | str | None = ...,
    target: Target = ...,
    preprocess: Preprocess | None = ...,
    class_names: Sequence[str] = ...,
) -> list[Heatmap]: ...


@overload
def heatmap(
    model: nn.Module,
    image: NDArray[np.uint8] | Tensor,
    *,
    method: str | Method | None = ...,
    layer: int | str | None = ...,
    target: Target = ...,
    preprocess: Preprocess | None = ...,
    class_names: Sequence[str] = ...,
) -> Any: ...


def heatmap(
    model: nn.Module,
    image: Picture | Sequence[Picture],
    *,
    method: str | Method | None = None,
    layer: int | str | None = None,
    target: Target = None,
    preprocess: Preprocess | None = None,
    class_names: Sequence[str] = (),
) -> Heatmap | list[Heatmap]:
    """Show where a model looked in a picture.

        >>> import numpy as np, timm, visionattn as va
        >>> model = timm.create_model("test_vit", num_classes=3)
        >>> picture = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
        >>> seen = va.heatmap(model, picture, method="rollout")
        >>> seen.values.shape, seen.overlay().shape
        ((120, 200), (120, 200, 3))

    The model stays as it is, in training mode too; it runs in evaluation mode, where it lies.

    Args:
        model: any vision model: timm's, torchvision's or yours, or a task that `visionattn.load` returned.
        image: a file, a PIL image, (H, W, 3) uint8 RGB, or (C, H, W) as the model takes it. A list of them, or an
            array with one axis more, is one batch and gives a list of results.
        method: a name in `maps.METHODS`, or a method; what fits the model by default.
        layer: where in the model to look, by the name of a module or its place in the order; the last that fits.
        target: the output to explain: its number or class name, one a picture, or a function from the model's output to
            (B,) scores; every picture's highest by default.
        preprocess: brings a picture to the model's input; models of timm and torchvision and tasks say their own. Of
            tensors, only its mean and std matter, by which the pictures are shown; ImageNet's by default.
        class_names: of the model's outputs; timm's models and tasks know theirs.

    Raises:
        UsageError: the method does not fit the model, it has no such layer or class, or it is not known how the model
            wants its pictures.
        DataError: a file cannot be read, or the model's values are not finite.
    """
    found = _look(model, _listed(image), method, layer, target, preprocess, class_names)
    return found[0] if _is_single(image) else found


def overlay(
    model: nn.Module,
    image: Picture,
    *,
    method: str | Method | None = None,
    layer: int | str | None = None,
    target: Target = None,
    preprocess: Preprocess | None = None,
    class_names: Sequence[str] = (),
    colormap: str = Style.colormap,
    alpha: float = Style.alpha,
    caption: bool = False,
) -> Image.Image:
    """Draw where a model looked over its picture: the overlay of `heatmap`, as a PIL image of the source's size.

        >>> import timm, torch, visionattn as va
        >>> model = timm.create_model("test_resnet")
        >>> va.overlay(model, torch.rand(3, 96, 128), method="eigencam").size
        (128, 96)

    A notebook shows it; `.save("seen.jpg")` writes it, and `np.asarray` makes (H, W, 3) uint8 RGB of it.

    Args:
        model, image, method, layer, target, preprocess, class_names: as `heatmap`, of one picture.
        colormap, alpha, caption: as `Heatmap.overlay`.

    Raises:
        UsageError, DataError: as `heatmap`.
    """
    if not _is_single(image):
        raise UsageError("overlay draws one picture; of several take heatmap(model, images), which gives a list")
    (found,) = _look(model, [image], method, layer, target, preprocess, class_names)
    return Image.fromarray(found.overlay(colormap=colormap, alpha=alpha, caption=caption))


def _look(
    model: nn.Module,
    pictures: Sequence[Picture],
    method: str | Method | None,
    layer: int | str | None,
    target: Target,
    preprocess: Preprocess | None,
    class_names: Sequence[str],
) -> list[Heatmap]:
    if not len(pictures):
        raise UsageError("there are no images; pass at least one")
    network, own, own_names = known_of(model)
    names = tuple(class_names) or own_names
    preprocess = preprocess or own
    prepared = [_prepare(picture, preprocess, number) for number, picture in enumerate(pictures)]
    sizes = sorted({tuple(values.shape) for _, _, values in prepared})
    if len(sizes) > 1:
        raise UsageError(f"the images of one batch must be of one size, and these are {sizes[0]} and {sizes[-1]}")
    view = View(network, preprocess or Preprocess(), class_names=names)
    images_BCHW = view.batch(torch.stack([values for _, _, values in prepared]))
    if isinstance(method, Method):
        if layer is not None:
            raise UsageError("a method has its own layer; give layer with the name of a method")
        chosen: Explain = method
    else:
        chosen = method_for(method, layer, network, images_BCHW)
    maps = chosen(network, images_BCHW, target=_wanted(view, target))
    targets = [None] * len(prepared) if maps.target is None else maps.target.tolist()
    predictions = predictions_of(view, maps.output, len(prepared))
    looks = looks_of(view, maps, [placement for _, placement, _ in prepared], predictions, [None] * len(prepared))
    return [
        Heatmap(source, maps.method, maps.source, goal, told["prediction"], told["class"], told["probability"], look)
        for (source, _, _), goal, told, look in zip(prepared, targets, predictions, looks, strict=True)
    ]


def _listed(image: Any) -> Sequence[Picture]:
    return [image] if _is_single(image) else image


def _is_single(image: Any) -> bool:
    if isinstance(image, (Tensor, np.ndarray)):
        if image.ndim not in (3, 4):
            raise UsageError(
                f"an image is (H, W, 3) uint8 RGB or a tensor (C, H, W), got {tuple(image.shape)} {image.dtype}"
            )
        return image.ndim == 3
    if isinstance(image, (str, bytes, os.PathLike, Image.Image)):
        return True
    if isinstance(image, Sequence):
        return False
    raise UsageError(
        f"an image is a file, a PIL image, (H, W, 3) uint8 RGB or a tensor (C, H, W), got {type(image).__name__}"
    )


def _prepare(picture: Any, preprocess: Preprocess | None, number: int) -> tuple[NDArray[np.uint8], Placement, Tensor]:
    """The picture, where it lies in the model's input, and that input (C, H, W)."""
    if isinstance(picture, Tensor) and picture.is_floating_point():
        if picture.ndim != 3:
            raise UsageError(f"image {number + 1} must be (C, H, W), got {tuple(picture.shape)}")
        shown = (preprocess or Preprocess()).denormalise(picture.detach().float().cpu().numpy())
        return shown, Placement.identity((shown.shape[0], shown.shape[1])), picture.detach()
    if isinstance(picture, Image.Image):
        picture = upright(picture)
    elif isinstance(picture, (str, bytes, os.PathLike)):
        picture = read_image(picture)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        what = f"{tuple(picture.shape)} {picture.dtype}" if hasattr(picture, "dtype") else type(picture).__name__
        raise UsageError(
            "an image is a file, a PIL image, (H, W, 3) uint8 RGB or a normalised floating tensor (C, H, W); "
            f"image {number + 1} is {what}"
        )
    if preprocess is None:
        raise UsageError(
            "this model does not say how it wants its pictures; pass preprocess=visionattn.data.Preprocess(224, …), "
            "or tensors that are prepared"
        )
    values, placement = preprocess(picture)
    return picture, placement, torch.from_numpy(values)


def _wanted(view: View, target: Target) -> "int | Tensor | Callable[[Any], Tensor] | None":
    if isinstance(target, str):
        return view.target(target)
    if isinstance(target, (list, tuple)):
        return torch.tensor(target)
    return target  # type: ignore[return-value]
