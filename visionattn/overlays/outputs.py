"""What can be made of one image and the heatmaps found in it: pictures, and files that hold the numbers. No torch.

Another kind is a function from a `Scene` to a picture, to named arrays or to the content of an animation, and a line in
`KINDS`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visionattn.data.decode import encode_animation
from visionattn.data.placement import Placement
from visionattn.drawing.boxes import FOUND, draw_boxes, label
from visionattn.drawing.overlay import DIFFERENCE, contour, top, top_mask
from visionattn.drawing.rendering import Style, render, render_difference, seen
from visionattn.drawing.resizing import shrink
from visionattn.drawing.scanpath import boxes_in_source, draw_gaze, gaze_animation
from visionattn.drawing.sheets import Tile, row, sheet, side_by_side
from visionattn.errors import UsageError, nearest

_TILE = 320  # pixels of the longer side of a picture in a sheet

Made: TypeAlias = "NDArray[np.uint8] | NDArray[np.uint16] | Mapping[str, NDArray[np.generic]] | bytes"
"""(H, W, 3) uint8 RGB, (H, W) grey, arrays by name, or the content of a file."""


@dataclass(frozen=True)
class Look:
    """How one model and method looked at one image.

    Attributes:
        name: sets it apart from the others.
        said: the prediction in words; "" where there is none.
        heatmap_hw: in [0, 1], spanning the model's input.
        raw_hw: before it was brought to [0, 1].
        placement: of the source in the model's input.
        boxes, labels: what a detector found, xyxy in pixels of the source.
        glimpses: (T, S, 4), what each glimpse covered at each scale, xyxy in pixels of the model's input.
        film: what a glimpse network saw and believed, as `glimpses.follow_gaze` tells it; for an animation only.
        class_names: of its outputs.
        maps: (N, h, w) in [0, 1], the heatmap of each box, spanning the model's input.
    """

    name: str
    said: str
    heatmap_hw: NDArray[np.float32]
    raw_hw: NDArray[np.float32]
    placement: Placement
    boxes: Sequence[Sequence[float]] = ()
    labels: Sequence[str] = ()
    glimpses: NDArray[np.float32] | None = None
    film: Mapping[str, NDArray[Any]] | None = None
    class_names: Sequence[str] = ()
    maps: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Scene:
    """One image and what was found in it.

    Attributes:
        picture: (H, W, 3) uint8 RGB, the source.
        looks: at least one.
        compared: whether the two looks are held against each other.
        boxes, labels: what a list says is in the image.
    """

    picture: NDArray[np.uint8]
    looks: Sequence[Look]
    style: Style
    compared: bool = False
    boxes: Sequence[Sequence[float]] = ()
    labels: Sequence[str] = ()


def overlay(scene: Scene) -> NDArray[np.uint8]:
    """One heatmap over the picture; of several, a sheet; of two that are compared, both and their difference."""
    if scene.compared:
        return _comparison(scene)
    return _one_or_sheet(scene, lambda picture, look: render(picture, look.heatmap_hw, look.placement, scene.style))


def contours(scene: Scene) -> NDArray[np.uint8]:
    """The picture with lines of equal heat: those of the style, or the one at one half."""
    levels = scene.style.contours or (0.5,)
    return _one_or_sheet(
        scene, lambda picture, look: contour(picture, look.placement.carry(look.heatmap_hw), levels=levels)
    )


def spotlight(scene: Scene) -> NDArray[np.uint8]:
    """The hottest pixels as they are, and the others dark and grey."""
    share = scene.style.top
    return _one_or_sheet(
        scene, lambda picture, look: top_mask(picture, look.placement.carry(look.heatmap_hw), share=share)
    )


def side(scene: Scene) -> NDArray[np.uint8]:
    """Picture, overlay and heatmap beside each other, with a colour bar and the prediction."""
    (look,), style = scene.looks, scene.style
    return side_by_side(
        _boxed(scene, scene.picture, look),
        look.placement.carry(look.heatmap_hw),
        title=look.said,
        colormap=style.colormap,
        alpha=style.alpha,
        seen_HW=seen(look.placement),
    )


def difference(scene: Scene) -> NDArray[np.uint8]:
    """Where the second of two models looks more (orange) and less (blue) than the first, at the size of the source."""
    return _boxed(scene, _difference(scene, scene.picture))


def heatmap(scene: Scene) -> NDArray[np.uint16]:
    """The heat of every pixel of the source, 65535 for 1; 0 where the model saw nothing."""
    (look,) = scene.looks
    return np.rint(look.placement.carry(look.heatmap_hw) * 65535).astype(np.uint16)


def mask(scene: Scene) -> NDArray[np.uint8]:
    """255 where the hottest pixels of the source are, 0 elsewhere."""
    (look,) = scene.looks
    return top(look.placement.carry(look.heatmap_hw), scene.style.top).astype(np.uint8) * 255


def gaze(scene: Scene) -> NDArray[np.uint8]:
    """The path of a network that takes glimpses, numbered, with every scale's box; small pictures are enlarged."""
    (look,) = scene.looks
    assert look.glimpses is not None  # else the export has ended before
    drawn = draw_gaze(_boxed(scene, scene.picture), boxes_in_source(look.glimpses, look.placement))
    return label(drawn, look.said) if scene.style.caption and look.said else drawn


def animation(scene: Scene) -> bytes:
    """Glimpse after glimpse what has been seen, as sharply as it was seen, and what is believed after it; see
    `gaze.gaze_animation`."""
    (look,) = scene.looks
    assert look.film is not None  # else the export has ended before
    frames = gaze_animation(
        scene.picture,
        look.film["boxes"],
        look.film["patches"],
        probabilities_TK=look.film["probabilities"],
        class_names=look.class_names,
    )
    return encode_animation(frames, ".webp")


def boxes(scene: Scene) -> NDArray[np.uint8]:
    """A sheet: the picture with all boxes that a detector found, then each box with its own heat."""
    small = _shrunk(scene)
    (look,), picture = small.looks, small.picture
    assert look.maps is not None  # else the export has ended before
    tiles = [Tile(_boxed(small, picture, replace(look, labels=())), [f"{len(look.boxes)} found"])]
    for box, text, map_hw in zip(look.boxes, look.labels, look.maps, strict=True):
        painted = render(picture, map_hw, look.placement, scene.style)
        tiles.append(Tile(draw_boxes(painted, [box], colours=[FOUND]), [text]))
    return sheet(tiles, columns=4, width=max(picture.shape[:2]))


def arrays(scene: Scene) -> Mapping[str, NDArray[np.generic]]:
    """Heatmaps as the model's grid has them, and the matrix that puts pixels of the source into the model's input.

    `heatmap` (h, w) in [0, 1], `raw` (h, w) before that, `matrix` (2, 3), `source_size` and `input_size`; of several,
    `NAME/heatmap` and so on. `data.Placement(matrix, source_size, input_size).carry(heatmap)` is the heatmap in pixels.
    Where glimpses were taken also `glimpses` (T, S, 4), the box of each at each scale, xyxy in pixels of the source. Of
    a detector also `boxes` (N, 4), xyxy in pixels of the source, and `maps` (N, h, w), the heatmap of each.
    """
    found: dict[str, NDArray[np.generic]] = {}
    for look in scene.looks:
        head = f"{look.name}/" if len(scene.looks) > 1 else ""
        found[f"{head}heatmap"], found[f"{head}raw"] = look.heatmap_hw, look.raw_hw
        found[f"{head}matrix"] = look.placement.matrix
        found[f"{head}source_size"] = np.array(look.placement.source_size)
        found[f"{head}input_size"] = np.array(look.placement.input_size)
        if look.glimpses is not None:
            found[f"{head}glimpses"] = boxes_in_source(look.glimpses, look.placement)
        if look.maps is not None:
            found[f"{head}boxes"] = np.array(look.boxes, np.float64).reshape(-1, 4)
            found[f"{head}maps"] = look.maps
    return found


class Kind(NamedTuple):
    """A function, the suffix of its files (None: that of the style), and how many looks it takes at most."""

    make: Callable[[Scene], Made]
    suffix: str | None = None
    most: int | None = None


KINDS = {
    "overlay": Kind(overlay),
    "contour": Kind(contours),
    "spotlight": Kind(spotlight),
    "side": Kind(side, most=1),
    "difference": Kind(difference),
    "heatmap": Kind(heatmap, ".png", most=1),
    "mask": Kind(mask, ".png", most=1),
    "gaze": Kind(gaze, most=1),
    "boxes": Kind(boxes, most=1),
    "animation": Kind(animation, ".webp", most=1),
    "array": Kind(arrays, ".npz"),
}
"""Name on the command line and in the manifest → kind."""


def check_kinds(kinds: Sequence[str], *, looks: int, compared: bool) -> None:
    """Raise where a kind is not known or does not fit.

    Raises:
        UsageError: it is not known, takes one method only, or takes two models.
    """
    if not kinds:
        raise UsageError(f"there is nothing to save; choose among {', '.join(KINDS)}")
    for kind in kinds:
        if kind not in KINDS:
            raise UsageError(f"there is no kind {kind!r} to save; there are {', '.join(KINDS)}.{nearest(kind, KINDS)}")
        if kind == "difference" and not compared:
            raise UsageError("difference holds two models against each other; name them by --compare A.ckpt B.ckpt")
        if (KINDS[kind].most or looks) < looks:
            raise UsageError(f"{kind} holds one heatmap an image and not {looks}; take array, or one method at a time")


def endings(kinds: Sequence[str], picture: str) -> dict[str, str]:
    """Kind → what its files end with, as `.overlay.jpg`, where pictures have the suffix `picture`."""
    return {kind: f".{kind}{KINDS[kind].suffix or picture}" for kind in kinds}


def _one_or_sheet(scene: Scene, paint: Callable[[NDArray[np.uint8], Look], NDArray[np.uint8]]) -> NDArray[np.uint8]:
    if len(scene.looks) == 1:
        (look,) = scene.looks
        painted = _boxed(scene, paint(scene.picture, look), look)
        return label(painted, look.said) if scene.style.caption and look.said else painted
    small = _shrunk(scene)
    picture = small.picture
    tiles = [Tile(_boxed(small, picture), ["image"])]
    tiles += [
        Tile(_boxed(small, paint(picture, look), look), [line for line in (look.name, look.said) if line])
        for look in small.looks
    ]
    return sheet(tiles, columns=min(4, len(tiles)), width=max(picture.shape[:2]))


def _comparison(scene: Scene) -> NDArray[np.uint8]:
    small = _shrunk(scene)
    picture, (first, second) = small.picture, small.looks
    panels = [(_boxed(small, picture), "image")]
    for look in (first, second):
        shown = render(picture, look.heatmap_hw, look.placement, small.style)
        panels.append((_boxed(small, shown, look), f"{look.name}: {look.said}" if look.said else look.name))
    panels.append((_boxed(small, _difference(small, picture)), f"{second.name} more, {first.name} less"))
    return row(panels, colormap=DIFFERENCE)


def _difference(scene: Scene, picture_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    first, second = scene.looks
    return render_difference(
        picture_HWC, first.heatmap_hw, first.placement, second.heatmap_hw, second.placement, scene.style
    )


def _boxed(scene: Scene, picture_HWC: NDArray[np.uint8], look: Look | None = None) -> NDArray[np.uint8]:
    """With the boxes of a list, and in a second colour those that the model found."""
    if scene.boxes:
        picture_HWC = draw_boxes(picture_HWC, scene.boxes, labels=scene.labels)
    if look is not None and look.boxes:
        picture_HWC = draw_boxes(picture_HWC, look.boxes, labels=look.labels, colours=[FOUND])
    return picture_HWC


def _shrunk(scene: Scene) -> Scene:
    """The same scene in a picture of at most `_TILE` pixels; heatmaps need not be carried to more."""
    picture = shrink(scene.picture, _TILE)
    if picture is scene.picture:
        return scene
    (height, width), size = scene.picture.shape[:2], (picture.shape[0], picture.shape[1])
    enlarged = Placement.scaling(size, (height, width))
    shrunk = Placement.scaling((height, width), size).boxes_to_input
    return replace(
        scene,
        picture=picture,
        looks=[
            replace(look, placement=look.placement @ enlarged, boxes=shrunk(np.array(look.boxes)).tolist())
            for look in scene.looks
        ],
        boxes=shrunk(np.array(scene.boxes)).tolist(),
    )
