"""Render heatmaps of the model's input over source pictures, and measure their peak and difference."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from visionattn.data import Placement
from visionattn.drawing.overlay import COLORMAPS, DIFFERENCE, blend, contour, shade
from visionattn.errors import UsageError, nearest

_BAND = 1 << 18  # pixels per band, so that large pictures need little memory beyond the picture and its overlay


@dataclass(frozen=True)
class Style:
    """The style of overlays.

    Attributes:
        colormap: a name in `COLORMAPS`.
        alpha: opacity of the hottest pixel, in [0, 1].
        saturation: fraction of the picture's own colour that is kept, in [0, 1].
        contours: levels in (0, 1] at which lines of equal heat are drawn.
        top: fraction of the pixels that mask and spotlight keep, in (0, 1].
        caption: whether the prediction is written into overlays.
        suffix: suffix of the picture files; it sets their format.

    Raises:
        UsageError: there is no such colormap or format, or a number is out of range.
    """

    colormap: str = "inferno"
    alpha: float = 0.75
    saturation: float = 0.45
    contours: tuple[float, ...] = ()
    top: float = 0.2
    caption: bool = False
    suffix: Literal[".jpg", ".png", ".webp"] = ".jpg"

    def __post_init__(self) -> None:
        if self.colormap not in COLORMAPS:
            near = nearest(self.colormap, COLORMAPS)
            raise UsageError(f"there is no colormap {self.colormap!r}; there are {', '.join(COLORMAPS)}.{near}")
        if not (0 <= self.alpha <= 1 and 0 <= self.saturation <= 1 and all(0 < level <= 1 for level in self.contours)):
            raise UsageError(
                f"alpha and saturation must be in [0, 1] and contours in (0, 1], got {self.alpha}, {self.saturation} "
                f"and {self.contours}"
            )
        if not 0 < self.top <= 1:
            raise UsageError(f"the fraction of hottest pixels must be in (0, 1], got {self.top}")
        if self.suffix not in (".jpg", ".png", ".webp"):
            raise UsageError(f"overlays are written as .jpg, .png or .webp, not {self.suffix!r}")


def render(
    image_HWC: NDArray[np.uint8], heatmap_hw: NDArray[np.floating], placement: Placement, style: Style
) -> NDArray[np.uint8]:
    """Draw a heatmap of the model's input over the source picture.

    Args:
        image_HWC: the source, (H, W, 3) uint8 RGB.
        heatmap_hw: heatmap in [0, 1], of any resolution; it spans the model's input.
        placement: placement of the source in the input.
        style: style of the overlay.

    Returns:
        (H, W, 3) uint8 RGB; pixels outside of the model's input are dark and grey.

    Raises:
        UsageError: the size of the picture differs from the source size of the placement.
    """
    _check(image_HWC, placement)
    rows, columns, whole = _seen_box(placement)
    out_HWC = np.empty_like(image_HWC) if (rows, columns) == _all(placement) else shade(image_HWC)
    inner = _part(placement, rows, columns)
    for band_rows, (band,) in _bands(inner):
        out_HWC[rows, columns][band_rows] = blend(
            image_HWC[rows, columns][band_rows],
            band.carry(heatmap_hw),
            colormap=style.colormap,
            alpha=style.alpha,
            saturation=style.saturation,
            seen_HW=None if whole else band.seen(),
        )
    if style.contours:  # on the whole picture, because lines cross the bands
        out_HWC = contour(out_HWC, placement.carry(heatmap_hw), levels=style.contours)
    return out_HWC


def render_difference(
    image_HWC: NDArray[np.uint8],
    first_hw: NDArray[np.floating],
    first_placement: Placement,
    second_hw: NDArray[np.floating],
    second_placement: Placement,
    style: Style,
) -> NDArray[np.uint8]:
    """Draw where the second heatmap is hotter than the first (orange) and where it is colder (blue).

    Pixels outside of the input of either model are dark and grey. The arguments are as for `render`, for two heatmaps.
    """
    _check(image_HWC, first_placement)
    _check(image_HWC, second_placement)
    out_HWC = np.empty_like(image_HWC)
    for rows, (first, second) in _bands(first_placement, second_placement):
        seen_HW = first.seen() & second.seen()
        signed_HW = second.carry(second_hw) - first.carry(first_hw)
        out_HWC[rows] = blend(
            image_HWC[rows], signed_HW / 2 + 0.5, colormap=DIFFERENCE, alpha=style.alpha, saturation=0, seen_HW=seen_HW
        )
    return out_HWC


def peak(heatmap_hw: NDArray[np.floating], placement: Placement) -> tuple[float, float] | None:
    """Return the hottest point of a heatmap, (x, y) in pixels of the source, or None if the heatmap is constant.

    The point is the centre of the hottest cell. If that cell lies in the padding, the point is the hottest pixel of the
    source.
    """
    heatmap_hw = np.asarray(heatmap_hw)
    if heatmap_hw.max() <= heatmap_hw.min():
        return None
    row, column = np.unravel_index(int(heatmap_hw.argmax()), heatmap_hw.shape)
    cells = np.array([[(column + 0.5) / heatmap_hw.shape[1], (row + 0.5) / heatmap_hw.shape[0]]])
    (input_h, input_w), (height, width) = placement.input_size, placement.source_size
    x, y = placement.to_source(cells * [input_w, input_h])[0]
    if not (0 <= x <= width and 0 <= y <= height):
        carried_HW = placement.carry(heatmap_hw)
        y, x = (int(place) + 0.5 for place in np.unravel_index(int(carried_HW.argmax()), carried_HW.shape))
    return float(x), float(y)


def heatmap_difference(
    first: tuple[NDArray[np.floating], Placement], second: tuple[NDArray[np.floating], Placement]
) -> tuple[float, tuple[float, float] | None]:
    """Measure the difference of two heatmaps of one picture.

    The heatmaps are compared on a grid of at most 128 × 128 points, where both inputs cover the picture.

    Args:
        first, second: a heatmap in [0, 1] and its placement.

    Returns:
        The mean of |second − first| in [0, 1], and the point of the largest difference, (x, y) in pixels of the source.
        The point is None for equal heatmaps.
    """
    height, width = first[1].source_size
    size = min(height, 128), min(width, 128)
    enlarge = Placement.scaling(size, (height, width))
    placed = [(heatmap_hw, placement @ enlarge) for heatmap_hw, placement in (first, second)]
    apart_HW = np.abs(placed[1][1].carry(placed[1][0]) - placed[0][1].carry(placed[0][0]))
    seen_HW = placed[0][1].seen() & placed[1][1].seen()
    apart_HW = np.where(seen_HW, apart_HW, 0)
    if not apart_HW.any():
        return 0.0, None
    row, column = np.unravel_index(int(apart_HW.argmax()), apart_HW.shape)
    place = (float(column) + 0.5) * width / size[1], (float(row) + 0.5) * height / size[0]
    return float(apart_HW.sum() / seen_HW.sum()), place


def seen(placement: Placement) -> NDArray[np.bool_] | None:
    """Return which pixels of the source lie in the model's input, (H, W) bool, or None if all do.

    The result is that of `Placement.seen`, but faster for placements without rotation.
    """
    rows, columns, whole = _seen_box(placement)
    if not whole:
        return placement.seen()
    if (rows, columns) == _all(placement):
        return None
    seen_HW = np.zeros(placement.source_size, bool)
    seen_HW[rows, columns] = True
    return seen_HW


def _seen_box(placement: Placement) -> tuple[slice, slice, bool]:
    """Return the rows and columns of the source in the model's input, and whether all pixels of this box are in it."""
    (height, width), (input_h, input_w) = placement.source_size, placement.input_size
    (x_scale, x_turn, left), (y_turn, y_scale, top) = placement.matrix
    if x_turn or y_turn:
        return slice(0, height), slice(0, width), False
    columns = x_scale * (np.arange(width) + 0.5) + left
    rows = y_scale * (np.arange(height) + 0.5) + top
    return _span((rows >= 0) & (rows <= input_h)), _span((columns >= 0) & (columns <= input_w)), True


def _all(placement: Placement) -> tuple[slice, slice]:
    height, width = placement.source_size
    return slice(0, height), slice(0, width)


def _span(inside: NDArray[np.bool_]) -> slice:
    places = np.flatnonzero(inside)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else slice(0, 0)


def _check(image_HWC: NDArray[np.uint8], placement: Placement) -> None:
    height, width = image_HWC.shape[:2]
    if (height, width) != tuple(placement.source_size):
        raise UsageError(f"the picture is {height} × {width}, but the placement is of one of {placement.source_size}")


def _bands(*placements: Placement) -> Iterator[tuple[slice, list[Placement]]]:
    """Yield bands of rows of the source, each with the placements of that band."""
    height, width = placements[0].source_size
    step = max(1, _BAND // max(1, width))
    for top in range(0, height, step):
        rows = slice(top, min(top + step, height))
        yield rows, [_part(placement, rows, slice(0, width)) for placement in placements]


def _part(placement: Placement, rows: slice, columns: slice) -> Placement:
    """Return the placement of some rows and columns of the source."""
    size = rows.stop - rows.start, columns.stop - columns.start
    shift = Placement(np.array([[1.0, 0, columns.start], [0, 1.0, rows.start]]), size, placement.source_size)
    return placement @ shift
