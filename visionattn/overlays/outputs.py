"""Kinds of output of one explained image: pictures, and files with the values of the heatmap.

This module does not import torch.

To add a kind, write a function that takes an `OutputScene` and returns a picture, named arrays or the content of an
animation. Decorate the function with `output`, which takes the kind's needs and its help text.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from visionattn.data import Placement, encode_animation
from visionattn.drawing import (
    DIFFERENCE,
    FOUND,
    Style,
    Tile,
    animate_glimpses,
    boxes_in_source,
    contour,
    draw_boxes,
    draw_scanpath,
    label,
    render,
    render_difference,
    row,
    seen,
    sheet,
    show_hottest,
    shrink,
    side_by_side,
    top,
)
from visionattn.errors import UsageError, nearest

VERSION = 3
"""This number is part of every fingerprint. Raise the number when the drawing of an output changes, so that earlier
outputs are made again.

`tests/overlays/test_outputs.py` compares the drawing with a golden image.
"""

_TILE = 320  # pixels of the longer side of a picture in a sheet

Needs: TypeAlias = Literal["two models", "glimpses", "a GlimpseNetwork", "boxes"]
"""Things that a kind of output can need besides a heatmap."""

Output: TypeAlias = "NDArray[np.uint8] | NDArray[np.uint16] | Mapping[str, NDArray[np.generic]] | bytes"
"""A picture (H, W, 3) uint8 RGB, a grey picture (H, W), arrays by name, or the content of a file."""


class GlimpseTrace(TypedDict):
    """The T glimpses of a network in one image, at S scales, with K classes.

    Keys:
        locations: (T, 2) xy in pixels of the source, the centre of each glimpse's finest box.
        boxes: (T, S, 4) xyxy in pixels of the source, the box of each glimpse at each scale, the finest first. Boxes
            may reach beyond the source.
        patches: (T, S, h, w, 3) uint8 RGB, the pixels that the network read.
        probabilities: (T, K), the class probabilities after each glimpse.
    """

    locations: NDArray[np.float64]
    boxes: NDArray[np.float64]
    patches: NDArray[np.uint8]
    probabilities: NDArray[np.float32]


@dataclass(frozen=True)
class ExplainedImage:
    """The explanation of one image by one model and method.

    Attributes:
        name: name that distinguishes this explanation from others of the same image.
        caption: the prediction as text, e.g. `"daisy 0.93"`; "" if there is none.
        heatmap_hw: (h, w) in [0, 1]; the heatmap spans the model's input.
        raw_hw: (h, w), the heatmap before it was scaled to [0, 1].
        placement: placement of the source in the model's input.
        boxes: boxes of a detector, xyxy in pixels of the source.
        labels: one label for each of `boxes`.
        glimpses: (T, S, 4), the box of each glimpse at each scale, xyxy in pixels of the model's input.
        glimpse_trace: glimpses of a `GlimpseNetwork`; traced only for animations.
        class_names: names of the model's outputs.
        maps: (N, h, w) in [0, 1], the heatmap of each of `boxes`; each heatmap spans the model's input.
    """

    name: str
    caption: str
    heatmap_hw: NDArray[np.float32]
    raw_hw: NDArray[np.float32]
    placement: Placement
    boxes: Sequence[Sequence[float]] = ()
    labels: Sequence[str] = ()
    glimpses: NDArray[np.float32] | None = None
    glimpse_trace: GlimpseTrace | None = None
    class_names: Sequence[str] = ()
    maps: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class OutputScene:
    """One image and its explanations.

    Attributes:
        picture: (H, W, 3) uint8 RGB, the source.
        explanations: at least one explanation of the image.
        style: style of the pictures.
        compared: whether the second of two explanations is compared with the first.
        boxes: boxes from the user's list of images, xyxy in pixels of the source.
        labels: one label for each of `boxes`, or none.
    """

    picture: NDArray[np.uint8]
    explanations: Sequence[ExplainedImage]
    style: Style
    compared: bool = False
    boxes: Sequence[Sequence[float]] = ()
    labels: Sequence[str] = ()


@dataclass(frozen=True)
class OutputKind:
    """A kind of output that `visionattn overlay --save` writes.

    Attributes:
        make: function from a scene to the output.
        help: one line for the command line.
        suffix: suffix of the files; None means the suffix of the style.
        max_methods: largest number of methods in one output; None means any number.
        needs: what the explanations must hold besides a heatmap; None means nothing else.
    """

    make: Callable[[OutputScene], Output]
    help: str
    suffix: str | None = None
    max_methods: int | None = None
    needs: Needs | None = None


OUTPUTS: dict[str, OutputKind] = {}
"""Name on the command line and in the manifest → kind, in the order of the help."""

_Make = TypeVar("_Make", bound=Callable[[OutputScene], Output])


def output(
    name: str, help: str, *, suffix: str | None = None, max_methods: int | None = None, needs: Needs | None = None
) -> Callable[[_Make], _Make]:
    """Register the decorated function in `OUTPUTS` under a name.

    Args:
        name: name on the command line and in the manifest.
        help, suffix, max_methods, needs: as for `OutputKind`.

    Returns:
        A decorator that returns the function unchanged.
    """

    def register(make: _Make) -> _Make:
        OUTPUTS[name] = OutputKind(make, help, suffix, max_methods, needs)
        return make

    return register


@output("overlay", "the heatmap over the picture, at its size; several methods or layers in one sheet")
def overlay(scene: OutputScene) -> NDArray[np.uint8]:
    """Draw one heatmap over the picture, several heatmaps in a sheet, or two compared heatmaps and their difference."""
    if scene.compared:
        return _comparison(scene)
    return _one_or_sheet(
        scene, lambda picture, explained: render(picture, explained.heatmap_hw, explained.placement, scene.style)
    )


@output("contour", "lines of equal heat on the picture")
def contours(scene: OutputScene) -> NDArray[np.uint8]:
    """Draw lines of equal heat on the picture, at the levels of the style, or at 0.5 if the style has no levels."""
    levels = scene.style.contours or (0.5,)
    return _one_or_sheet(
        scene,
        lambda picture, explained: contour(picture, _drawn(explained, scene.style), levels=levels),
    )


@output("spotlight", "the hottest pixels as they are, the others dark and grey")
def spotlight(scene: OutputScene) -> NDArray[np.uint8]:
    """Show the hottest pixels as they are and the others dark and grey."""
    fraction = scene.style.top
    return _one_or_sheet(
        scene,
        lambda picture, explained: show_hottest(picture, _drawn(explained, scene.style), fraction=fraction),
    )


@output("side", "picture, overlay and heatmap side by side, with a colour bar", max_methods=1)
def side(scene: OutputScene) -> NDArray[np.uint8]:
    """Draw the picture, its overlay and the heatmap side by side, with a colour bar and the prediction."""
    (explained,), style = scene.explanations, scene.style
    return side_by_side(
        _boxed(scene, scene.picture, explained),
        _drawn(explained, style),
        title=explained.caption,
        colormap=style.colormap,
        alpha=style.alpha,
        seen_HW=seen(explained.placement),
    )


@output(
    "difference", "with --compare: where the second heatmap is hotter (orange) or colder (blue)", needs="two models"
)
def difference(scene: OutputScene) -> NDArray[np.uint8]:
    """Draw where the second heatmap is hotter (orange) or colder (blue) than the first, at the size of the source."""
    return _boxed(scene, _difference(scene, scene.picture))


@output("heatmap", "the heatmap as a 16-bit PNG of the picture's size", suffix=".png", max_methods=1)
def heatmap(scene: OutputScene) -> NDArray[np.uint16]:
    """Return the heat of every pixel of the source, scaled from [0, 1] to [0, 65535]; 0 outside the model's input.

    These are values and no drawing, so they are linear between the cells for every style, as `Heatmap.values` are.
    """
    (explained,) = scene.explanations
    return np.rint(explained.placement.carry(explained.heatmap_hw) * 65535).astype(np.uint16)


@output("mask", "PNG: 255 for the hottest pixels, 0 for the others", suffix=".png", max_methods=1)
def mask(scene: OutputScene) -> NDArray[np.uint8]:
    """Return 255 for the hottest pixels of the source and 0 for the others."""
    (explained,) = scene.explanations
    return top(_drawn(explained, scene.style), scene.style.top).astype(np.uint8) * 255


@output(
    "gaze",
    "for networks that take glimpses: the numbered path and the box of every scale",
    max_methods=1,
    needs="glimpses",
)
def gaze(scene: OutputScene) -> NDArray[np.uint8]:
    """Draw the numbered path of the glimpses with the box of every scale; small pictures are enlarged."""
    (explained,) = scene.explanations
    assert explained.glimpses is not None  # `check_needs` has checked this
    drawn = draw_scanpath(_boxed(scene, scene.picture), boxes_in_source(explained.glimpses, explained.placement))
    return label(drawn, explained.caption) if scene.style.caption and explained.caption else drawn


@output(
    "animation",
    "for a GlimpseNetwork: .webp of the patches read and the class probabilities after each glimpse",
    suffix=".webp",
    max_methods=1,
    needs="a GlimpseNetwork",
)
def animation(scene: OutputScene) -> bytes:
    """Animate the glimpses: the patches read so far, as sharp as they were read, and the class probabilities.

    See `drawing.animate_glimpses`.
    """
    (explained,) = scene.explanations
    assert explained.glimpse_trace is not None  # `check_needs` has checked this
    frames = animate_glimpses(
        scene.picture,
        explained.glimpse_trace["boxes"],
        explained.glimpse_trace["patches"],
        probabilities_TK=explained.glimpse_trace["probabilities"],
        class_names=explained.class_names,
    )
    return encode_animation(frames, ".webp")


@output("boxes", "for a detector: each detected box with its own heatmap, in a sheet", max_methods=1, needs="boxes")
def boxes(scene: OutputScene) -> NDArray[np.uint8]:
    """Draw a sheet: the picture with all detected boxes, then each box with its own heatmap."""
    small = _shrunk(scene)
    (explained,), picture = small.explanations, small.picture
    assert explained.maps is not None  # `check_needs` has checked this
    tiles = [Tile(_boxed(small, picture, replace(explained, labels=())), [f"{len(explained.boxes)} found"])]
    for box, text, map_hw in zip(explained.boxes, explained.labels, explained.maps, strict=True):
        painted = render(picture, map_hw, explained.placement, scene.style)
        tiles.append(Tile(draw_boxes(painted, [box], colours=[FOUND]), [text]))
    return sheet(tiles, columns=4, width=max(picture.shape[:2]))


@output("array", ".npz: the heatmap on the model's grid, and the matrix that places it in the picture", suffix=".npz")
def arrays(scene: OutputScene) -> Mapping[str, NDArray[np.generic]]:
    """Return the heatmap on the model's grid, and the matrix from pixels of the source to pixels of the model's input.

    `data.Placement(matrix, source_size, input_size).carry(heatmap)` is the heatmap in pixels of the source.

    Returns:
        `heatmap` (h, w) in [0, 1]; `raw` (h, w), the heatmap before scaling; `matrix` (2, 3); `source_size` and
        `input_size`, (height, width). With glimpses also `glimpses` (T, S, 4), the box of each glimpse at each scale,
        xyxy in pixels of the source. For a detector also `boxes` (N, 4), xyxy in pixels of the source, and `maps`
        (N, h, w), the heatmap of each box. With several explanations the keys are `NAME/heatmap` and so on.
    """
    named: dict[str, NDArray[np.generic]] = {}
    for explained in scene.explanations:
        head = f"{explained.name}/" if len(scene.explanations) > 1 else ""
        named[f"{head}heatmap"], named[f"{head}raw"] = explained.heatmap_hw, explained.raw_hw
        named[f"{head}matrix"] = explained.placement.matrix
        named[f"{head}source_size"] = np.array(explained.placement.source_size)
        named[f"{head}input_size"] = np.array(explained.placement.input_size)
        if explained.glimpses is not None:
            named[f"{head}glimpses"] = boxes_in_source(explained.glimpses, explained.placement)
        if explained.maps is not None:
            named[f"{head}boxes"] = np.array(explained.boxes, np.float64).reshape(-1, 4)
            named[f"{head}maps"] = explained.maps
    return named


def check_outputs(kinds: Sequence[str], *, explanations: int, compared: bool) -> None:
    """Check that kinds of output exist and can show the given explanations.

    Args:
        kinds: names in `OUTPUTS`.
        explanations: number of explanations of each image.
        compared: whether two models are compared.

    Raises:
        UsageError: no kind is given, or a kind does not exist, cannot show so many explanations, or needs two models.
    """
    if not kinds:
        raise UsageError(f"no kind of output is given; choose among {', '.join(OUTPUTS)}")
    for kind in kinds:
        if kind not in OUTPUTS:
            raise UsageError(
                f"there is no kind {kind!r} to save; choose among {', '.join(OUTPUTS)}.{nearest(kind, OUTPUTS)}"
            )
        if OUTPUTS[kind].needs == "two models" and not compared:
            raise UsageError(f"{kind} compares two models; name them with --compare A.ckpt B.ckpt")
        if (OUTPUTS[kind].max_methods or explanations) < explanations:
            raise UsageError(
                f"{kind} holds one heatmap per image, got {explanations}; save array, or use one method at a time"
            )


def check_needs(kinds: Sequence[str], *, model: str, method: str, available: Collection[Needs]) -> None:
    """Check that the explanations hold what kinds of output need.

    Args:
        kinds: names in `OUTPUTS`.
        model, method: names for the error message.
        available: what the explanations hold besides a heatmap.

    Raises:
        UsageError: a need is not met; the message names a method or model that meets it.
    """
    advice = {
        "glimpses": "take the method gaze with a network that reads the image through a Retina",
        "boxes": "take odam, sampling, attention or drise with a detector",
        "a GlimpseNetwork": "take a GlimpseNetwork",
    }
    for kind in kinds:
        need = OUTPUTS[kind].needs
        if need in advice and need not in available:
            raise UsageError(
                f"the kind of output {kind!r} needs {need}, and {method} on this {model} gives none; save another "
                f"kind, or {advice[need]}"
            )


def endings(kinds: Sequence[str], picture: str) -> dict[str, str]:
    """Return the ending of each kind's file names, e.g. `.overlay.jpg`.

    Args:
        kinds: names in `OUTPUTS`.
        picture: suffix of pictures, including the dot.
    """
    return {kind: f".{kind}{OUTPUTS[kind].suffix or picture}" for kind in kinds}


def _drawn(explained: ExplainedImage, style: Style) -> NDArray[np.float32]:
    """Return the heat of every pixel of the source, as drawn."""
    return explained.placement.carry(explained.heatmap_hw, style.interpolation)


def _one_or_sheet(
    scene: OutputScene, paint: Callable[[NDArray[np.uint8], ExplainedImage], NDArray[np.uint8]]
) -> NDArray[np.uint8]:
    if len(scene.explanations) == 1:
        (explained,) = scene.explanations
        painted = _boxed(scene, paint(scene.picture, explained), explained)
        return label(painted, explained.caption) if scene.style.caption and explained.caption else painted
    small = _shrunk(scene)
    picture = small.picture
    tiles = [Tile(_boxed(small, picture), ["image"])]
    tiles += [
        Tile(
            _boxed(small, paint(picture, explained), explained),
            [line for line in (explained.name, explained.caption) if line],
        )
        for explained in small.explanations
    ]
    return sheet(tiles, columns=min(4, len(tiles)), width=max(picture.shape[:2]))


def _comparison(scene: OutputScene) -> NDArray[np.uint8]:
    small = _shrunk(scene)
    picture, (first, second) = small.picture, small.explanations
    panels = [(_boxed(small, picture), "image")]
    for explained in (first, second):
        shown = render(picture, explained.heatmap_hw, explained.placement, small.style)
        panels.append(
            (
                _boxed(small, shown, explained),
                f"{explained.name}: {explained.caption}" if explained.caption else explained.name,
            )
        )
    panels.append((_boxed(small, _difference(small, picture)), f"{second.name} more, {first.name} less"))
    return row(panels, colormap=DIFFERENCE)


def _difference(scene: OutputScene, picture_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    first, second = scene.explanations
    return render_difference(
        picture_HWC, first.heatmap_hw, first.placement, second.heatmap_hw, second.placement, scene.style
    )


def _boxed(
    scene: OutputScene, picture_HWC: NDArray[np.uint8], explained: ExplainedImage | None = None
) -> NDArray[np.uint8]:
    """Draw the boxes of the user's list, and the detected boxes of an explanation in a second colour."""
    if scene.boxes:
        picture_HWC = draw_boxes(picture_HWC, scene.boxes, labels=scene.labels)
    if explained is not None and explained.boxes:
        picture_HWC = draw_boxes(picture_HWC, explained.boxes, labels=explained.labels, colours=[FOUND])
    return picture_HWC


def _shrunk(scene: OutputScene) -> OutputScene:
    """Shrink the picture to at most `_TILE` pixels a side, so that drawing the heatmaps is fast."""
    picture = shrink(scene.picture, _TILE)
    if picture is scene.picture:
        return scene
    (height, width), size = scene.picture.shape[:2], (picture.shape[0], picture.shape[1])
    enlarged = Placement.scaling(size, (height, width))
    shrunk = Placement.scaling((height, width), size).boxes_to_input
    return replace(
        scene,
        picture=picture,
        explanations=[
            replace(
                explained, placement=explained.placement @ enlarged, boxes=shrunk(np.array(explained.boxes)).tolist()
            )
            for explained in scene.explanations
        ],
        boxes=shrunk(np.array(scene.boxes)).tolist(),
    )
