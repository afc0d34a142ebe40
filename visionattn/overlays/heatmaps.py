"""Heatmaps and overlays of single images, for notebooks and scripts.

`overlays.export` handles whole folders: it reads images ahead, keeps a manifest, and continues after an interruption.

Shapes: B images, C channels, H × W pixels of a picture, h × w grid of the model.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, BinaryIO, TypeAlias, TypeGuard, overload

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from visionattn.data import Interpolation, Placement, Preprocess, encode_image, read_image, upright, write_image
from visionattn.drawing import Style, peak, shrink
from visionattn.errors import UsageError
from visionattn.maps import Method
from visionattn.overlays import outputs
from visionattn.overlays.explainer import (
    Explain,
    Explainer,
    assumed_preprocess,
    describe_model,
    explained_images,
    find_method,
    predictions_of,
)
from visionattn.overlays.outputs import ExplainedImage, OutputScene
from visionattn.overlays.targets import named_target

Picture: TypeAlias = str | bytes | os.PathLike[str] | BinaryIO | Image.Image | NDArray[np.uint8] | Tensor
"""A file's name (also as bytes), a file that is open for reading (e.g. `io.BytesIO(content)`), a PIL image, (H, W, 3)
uint8 RGB, or a normalised tensor (C, H, W)."""

Target: TypeAlias = int | str | Sequence[int] | Tensor | Callable[[Any], Tensor] | None
"""An output's index or class name, one index for each picture, or a function from the model's output to (B,) scores."""

_SHOWN = 768  # pixels of the longer side in a notebook, so that photographs do not make the notebook file huge


@dataclass(frozen=True, eq=False, repr=False)
class Heatmap:
    """The heatmap of one picture, with the model's prediction. Notebooks display the overlay.

    A pickle of this object holds the picture and the heatmap on the model's grid, but not the heat of every pixel.

    Attributes:
        image: (H, W, 3) uint8 RGB, the source.
        method: name of the method.
        source: what the heatmap shows, e.g. `"gate of layer4.1"`.
        target: index of the explained output; None if the method explains no particular output.
        prediction: index of the most probable class; None if the model is no classifier.
        class_name: name of the predicted class; None if unknown.
        probability: probability of the predicted class, by sigmoid for independent labels, else by softmax; None if
            the model is no classifier.
        explained: the explanation, with the heatmap on the model's grid (`heatmap_hw`) and the source's `placement`.
    """

    image: NDArray[np.uint8]
    method: str
    source: str
    target: int | None
    prediction: int | None
    class_name: str | None
    probability: float | None
    explained: ExplainedImage

    @cached_property
    def values(self) -> NDArray[np.float32]:
        """The heat of every pixel of the source, (H, W) in [0, 1]; 0 outside of the model's input.

        Values are linear between the cells of the model's grid, however the overlay is drawn.
        """
        return self.explained.placement.carry(self.explained.heatmap_hw)

    @property
    def peak(self) -> tuple[float, float] | None:
        """The hottest point, (x, y) in pixels of the source; None if the heatmap is constant."""
        return peak(self.explained.heatmap_hw, self.explained.placement)

    def to_dict(self) -> dict[str, object]:
        """Convert the heatmap and its facts to plain data that JSON can hold.

        Returns:
            `width` and `height` of the source, `method`, `layer`, `target`, `prediction`, `class`, `probability` and
            `peak` as in the manifest of `overlays.export`; and `heatmap`, the rows of the model's grid, in [0, 1].
        """
        height, width = self.image.shape[:2]
        return {
            "width": width,
            "height": height,
            "method": self.method,
            "layer": self.source,
            "target": self.target,
            "prediction": self.prediction,
            "class": self.class_name,
            "probability": self.probability,
            "peak": None if self.peak is None else list(self.peak),
            "heatmap": self.explained.heatmap_hw.tolist(),
        }

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if name != "values"}  # `values` can be computed again

    def overlay(
        self,
        *,
        colormap: str = Style.colormap,
        alpha: float = Style.alpha,
        saturation: float = Style.saturation,
        contours: Sequence[float] = (),
        caption: bool = False,
        interpolation: Interpolation = Style.interpolation,
    ) -> NDArray[np.uint8]:
        """Draw the heatmap over the picture; pixels outside of the model's input are dark.

        Args:
            colormap: inferno, magma, plasma, viridis, cividis, turbo or bone.
            alpha: opacity of the hottest pixel, in [0, 1].
            saturation: fraction of the picture's colour that is kept, in [0, 1]; at 0 the picture is grey.
            contours: levels in (0, 1] at which lines of equal heat are drawn.
            caption: whether to write the prediction into the picture.
            interpolation: `smooth`, `linear`, or `nearest`, which shows the cells of the model's grid.

        Returns:
            (H, W, 3) uint8 RGB.

        Raises:
            UsageError: there is no such colormap or interpolation, or a number is out of range.
        """
        style = Style(colormap, alpha, saturation, tuple(contours), caption=caption, interpolation=interpolation)
        return outputs.overlay(OutputScene(self.image, [self.explained], style))

    def save(self, path: "str | bytes | os.PathLike[str]") -> None:
        """Write the overlay into a file, at the size of the source.

        Args:
            path: ends in .jpg, .png or .webp.

        Raises:
            DataError: the folder is missing, the disk is full, or the suffix is another one.
        """
        write_image(path, self.overlay())

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        parts = [f"{self.method} of {self.source}", f"{width} × {height}"]
        parts += [self.explained.caption] if self.explained.caption else []
        parts += ["constant" if self.peak is None else f"hottest at ({self.peak[0]:.0f}, {self.peak[1]:.0f})"]
        return f"Heatmap({', '.join(parts)})"

    def _repr_png_(self) -> bytes:
        return encode_image(shrink(self.overlay(), _SHOWN), ".png")


_Single: TypeAlias = str | bytes | os.PathLike[str] | BinaryIO | Image.Image


@overload
def heatmap(  # type: ignore[overload-overlap]  # a string is one picture and also a sequence of strings
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
) -> Any: ...  # a Heatmap or a list, depending on the number of axes, which no type expresses


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
    """Compute a heatmap that shows which parts of a picture a model uses.

        >>> import numpy as np, timm, visionattn as va
        >>> model = timm.create_model("test_vit", num_classes=3)
        >>> picture = np.random.default_rng(0).integers(0, 256, (120, 200, 3), dtype=np.uint8)
        >>> seen = va.heatmap(model, picture, method="rollout")
        >>> seen.values.shape, seen.overlay().shape
        ((120, 200), (120, 200, 3))

    The model runs on its own device in evaluation mode. Afterwards it is unchanged, including its training mode.

    Args:
        model: any vision model of timm, torchvision or your own, or a task that `visionattn.load` returned.
        image: a file, a PIL image, (H, W, 3) uint8 RGB, or a normalised tensor (C, H, W). A list of pictures, or
            an array or tensor with one more axis, is one batch.
        method: a name in `maps.METHODS` or `maps.BOX_METHODS`, or a method. Default: one that fits the model.
        layer: name of a module, or its index among the modules that the method uses. Default: chosen by the method.
        target: the output to explain: an index, a class name or another form of `visionattn overlay --target`, one
            index for each picture, or a function from the model's output to (B,) scores, e.g. `maps.Margin`. Default:
            the highest output of each picture.
        preprocess: prepares a picture for the model. Default: the model's own, known for timm, torchvision, tasks and
            `load_model`; for other models 224 × 224 pixels with ImageNet's mean and std, which a warning says once.
            For tensors, only its mean and std are used, to show them as pictures (default: ImageNet's).
        class_names: names of the model's outputs. Default: the model's own, known for timm and tasks.

    Returns:
        A `Heatmap` for one picture, a list of `Heatmap`s for a batch.

    Raises:
        UsageError: the method does not fit the model, or there is no such layer or class.
        DataError: a file cannot be read, or the model's values are not finite.
    """
    if _is_single(image):
        return _heatmaps(model, [image], method, layer, target, preprocess, class_names)[0]
    return _heatmaps(model, _several(image), method, layer, target, preprocess, class_names)


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
    interpolation: Interpolation = Style.interpolation,
) -> Image.Image:
    """Draw the heatmap of a model over its picture. The result is a PIL image of the source's size.

        >>> import timm, torch, visionattn as va
        >>> model = timm.create_model("test_resnet")
        >>> va.overlay(model, torch.rand(3, 96, 128), method="eigencam").size
        (128, 96)

    A notebook shows the image, `.save("seen.jpg")` writes it, and `np.asarray` turns it into (H, W, 3) uint8 RGB.

    Args:
        model, image, method, layer, target, preprocess, class_names: as for `heatmap`, for one picture.
        colormap, alpha, caption, interpolation: as for `Heatmap.overlay`.

    Raises:
        UsageError, DataError: as for `heatmap`.
    """
    if not _is_single(image):
        raise UsageError("overlay draws one picture; for several call heatmap(model, images), which returns a list")
    (explained,) = _heatmaps(model, [image], method, layer, target, preprocess, class_names)
    return Image.fromarray(
        explained.overlay(colormap=colormap, alpha=alpha, caption=caption, interpolation=interpolation)
    )


def _heatmaps(
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
    network, own, own_names = describe_model(model)
    names = tuple(class_names) or own_names
    preprocess = preprocess or own
    if preprocess is None and not all(isinstance(picture, Tensor) for picture in pictures):
        preprocess = assumed_preprocess(network, stacklevel=4)
    prepared = [_prepare(picture, preprocess, number) for number, picture in enumerate(pictures)]
    sizes = sorted({tuple(values.shape) for _, _, values in prepared})
    if len(sizes) > 1:
        raise UsageError(f"the images of one batch must be of one size, got {sizes[0]} and {sizes[-1]}")
    explainer = Explainer(network, preprocess or Preprocess(), class_names=names)
    images_BCHW = explainer.batch(torch.stack([values for _, _, values in prepared]))
    if isinstance(method, Method):
        if layer is not None:
            raise UsageError("a method has its own layer; give layer only with the name of a method")
        explain: Explain = method
    else:
        explain = find_method(method, layer, network, images_BCHW)
    maps = explain(network, images_BCHW, target=_target_of_method(explainer, target))
    targets = [None] * len(prepared) if maps.target is None else maps.target.tolist()
    predictions = predictions_of(explainer, maps.output, len(prepared))
    explanations = explained_images(
        explainer, maps, [placement for _, placement, _ in prepared], predictions, [None] * len(prepared)
    )
    return [
        Heatmap(
            source,
            maps.method,
            maps.source,
            index,
            prediction.index,
            prediction.class_name,
            prediction.probability,
            explained,
        )
        for (source, _, _), index, prediction, explained in zip(
            prepared, targets, predictions, explanations, strict=True
        )
    ]


def _several(images: "Picture | Sequence[Picture]") -> Sequence[Picture]:
    return list(images)  # type: ignore[arg-type]  # called only for several pictures


def _is_single(image: "Picture | Sequence[Picture]") -> TypeGuard[Picture]:
    if isinstance(image, (Tensor, np.ndarray)):
        if image.ndim not in (3, 4):
            raise UsageError(
                f"an image is (H, W, 3) uint8 RGB or a tensor (C, H, W), got {tuple(image.shape)} {image.dtype}"
            )
        return image.ndim == 3
    if isinstance(image, Image.Image) or _is_file(image):
        return True
    if isinstance(image, Sequence):
        return False
    raise UsageError(
        f"an image is a file, a PIL image, (H, W, 3) uint8 RGB or a tensor (C, H, W), got {type(image).__name__}"
    )


def _is_file(image: object) -> "TypeGuard[str | bytes | os.PathLike[str] | BinaryIO]":
    return isinstance(image, (str, bytes, os.PathLike)) or hasattr(image, "read")


def _prepare(
    picture: Picture, preprocess: Preprocess | None, number: int
) -> tuple[NDArray[np.uint8], Placement, Tensor]:
    """Return the picture (H, W, 3), its placement in the model's input, and that input (C, H, W).

    Raises:
        UsageError: the picture has a wrong type or shape.
        DataError: the file cannot be read.
    """
    if isinstance(picture, Tensor) and picture.is_floating_point():
        if picture.ndim != 3:
            raise UsageError(f"image {number + 1} must be (C, H, W), got {tuple(picture.shape)}")
        shown = (preprocess or Preprocess()).denormalise(picture.detach().float().cpu().numpy())
        return shown, Placement.identity((shown.shape[0], shown.shape[1])), picture.detach()
    if isinstance(picture, Image.Image):
        picture = upright(picture)
    elif _is_file(picture):
        picture = read_image(picture)
    if not isinstance(picture, np.ndarray) or picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        kind = type(picture).__name__
        if isinstance(picture, (Tensor, np.ndarray)):
            kind = f"{tuple(picture.shape)} {picture.dtype}"
        raise UsageError(
            "an image is a file, a PIL image, (H, W, 3) uint8 RGB or a normalised float tensor (C, H, W); "
            f"image {number + 1} is {kind}"
        )
    assert preprocess is not None  # only tensors come without one
    values, placement = preprocess(picture)
    return picture, placement, torch.from_numpy(values)


def _target_of_method(explainer: Explainer, target: Target) -> "int | Tensor | Callable[[Any], Tensor] | None":
    """Convert the target to the form that methods take."""
    if isinstance(target, str):
        return named_target(explainer, target)
    if isinstance(target, Sequence):
        return torch.tensor(target)
    return target
