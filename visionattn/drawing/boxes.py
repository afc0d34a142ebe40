"""Draw boxes and labels on pictures.

Pictures are (H, W, 3) uint8 RGB and are not changed in place, except by `outline`; boxes are xyxy in pixels.
"""

from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visionattn.drawing.fonts import PAPER, Colour, fit, write
from visionattn.drawing.overlay import line_width
from visionattn.drawing.resizing import enlarge, shrink
from visionattn.errors import UsageError

_PALETTE: tuple[Colour, ...] = ((80, 220, 255), (255, 176, 0), (220, 130, 255), (120, 230, 120), (255, 110, 110))


FOUND: Colour = _PALETTE[1]
"""Colour of detected boxes in overlays, where the boxes of a list have the first colour of the palette."""


def draw_box(
    image_HWC: NDArray[np.uint8], box: Sequence[float], *, colour: Colour = _PALETTE[0], thickness: int | None = None
) -> NDArray[np.uint8]:
    """Draw a box on a copy of a picture: a line just inside the box's edge, and a dark rim just inside the line.

    Args:
        image_HWC: the picture.
        box: xyxy in pixels.
        colour: RGB.
        thickness: thickness of the line in pixels, without the rim. Default: `line_width(image_HWC)`.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    drawn = np.array(image_HWC, order="C")
    outline(drawn, box, colour, thickness or line_width(image_HWC))
    return drawn


def outline(
    drawn: NDArray[np.uint8],
    box: Sequence[float] | NDArray[np.floating],
    colour: Colour,
    thickness: int,
    *,
    rim: bool = True,
) -> None:
    """Draw a box as `draw_box` does, but on the picture itself. Parts outside the picture are clipped.

    Args:
        drawn: the picture to draw on.
        box: xyxy in pixels.
        colour: RGB.
        thickness: thickness of the line in pixels, without the rim.
        rim: whether to draw the dark rim.
    """
    left, upper, right, lower = (round(float(edge)) for edge in box)
    for inset in range(thickness + rim):
        corners = (left + inset, upper + inset), (right - 1 - inset, lower - 1 - inset)
        if corners[1][0] < corners[0][0] or corners[1][1] < corners[0][1]:
            break
        cv2.rectangle(drawn, *corners, colour if inset < thickness else (0, 0, 0), 1)


def label(
    image_HWC: NDArray[np.uint8], text: str, *, place: tuple[int, int] = (0, 0), colour: Colour = _PALETTE[0]
) -> NDArray[np.uint8]:
    """Write a line of text with a background on a copy of a picture.

    Args:
        image_HWC: the picture.
        text: one line. A line wider than the picture is cut and ends in ….
        place: (x, y) of the upper left corner in pixels.
        colour: colour of the background, RGB.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    page = Image.fromarray(image_HWC)
    _label(page, text, place, colour, _text_size(image_HWC))
    return np.array(page)


def draw_boxes(
    image_HWC: NDArray[np.uint8],
    boxes_N4: Sequence[Sequence[float]] | NDArray[np.floating],
    *,
    labels: Sequence[str] = (),
    colours: Sequence[Colour] = _PALETTE,
) -> NDArray[np.uint8]:
    """Draw boxes with their labels on a copy of a picture.

    A label is drawn above its box, or inside the box if there is no room above.

    Args:
        image_HWC: the picture.
        boxes_N4: xyxy in pixels.
        labels: one label for each box, or none.
        colours: RGB colours of the boxes, repeated if there are more boxes.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UsageError: the number of labels differs from the number of boxes.
    """
    if len(labels) not in (0, len(boxes_N4)):
        raise UsageError(f"{len(labels)} labels for {len(boxes_N4)} boxes; give one label for each box, or none")
    drawn = np.array(image_HWC, order="C")
    for number, box in enumerate(boxes_N4):
        drawn = draw_box(drawn, box, colour=colours[number % len(colours)])
    page = Image.fromarray(drawn)
    size = _text_size(drawn)
    for number, text in enumerate(labels):
        left, upper = (round(edge) for edge in boxes_N4[number][:2])
        high = round(size * 1.35)
        y = upper - high if upper >= high else max(0, upper)
        _label(page, text, (left, y), colours[number % len(colours)], size)
    return np.array(page)


def fit_to_side(
    image_HWC: NDArray[np.uint8], boxes: NDArray[np.floating], side: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Resize a picture and its boxes before drawing, so that lines and text are sharp.

    If the longer side of the picture exceeds `side`, the picture is shrunk to `side`. Otherwise the picture is enlarged
    by the largest whole factor with which its longer side stays within `side`.

    Args:
        image_HWC: the picture.
        boxes: (…, 4) xyxy in pixels of the picture.
        side: limit on the longer side in pixels.

    Returns:
        The resized picture, and the boxes in pixels of the resized picture.
    """
    height, width = image_HWC.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return enlarge(image_HWC, int(scale)), np.asarray(boxes, np.float64) * int(scale)
    small = shrink(image_HWC, side)
    size = small.shape[1], small.shape[0]
    return small, np.asarray(boxes, np.float64) * (np.array(size * 2) / (width, height, width, height))


def _label(page: Image.Image, text: str, place: tuple[int, int], colour: Colour, size: int) -> None:
    font, line = fit(text, size=size, width=page.width - 8)
    wide, high = round(font.getlength(line)) + 8, round(size * 1.35)
    x, y = max(0, min(place[0], page.width - wide)), place[1]
    page.paste(colour, (x, y, x + wide, y + high))
    write(page, (x + 4, y + round(size * 0.08)), line, size=size, colour=PAPER, width=wide)


def _text_size(image_HWC: NDArray[np.uint8]) -> int:
    return max(10, min(40, round(min(image_HWC.shape[:2]) / 28)))
