"""Overlays and sheets of them: NumPy, OpenCV and Pillow's font, no torch.

Pictures are (H, W, 3) uint8 RGB; heatmaps (H, W) in [0, 1]; boxes xyxy in pixels.
"""

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from visionattn.errors import UsageError, nearest

COLORMAPS = {
    name: getattr(cv2, f"COLORMAP_{name.upper()}")
    for name in ("inferno", "magma", "plasma", "viridis", "cividis", "turbo", "bone")
}
"""Perceptually uniform ones first, then turbo and bone."""

_INK = (236, 236, 236)
_FAINT = (150, 150, 150)
_PAPER = (24, 24, 27)
_RIGHT = (110, 200, 120)
_WRONG = (240, 110, 90)
_BOX = (80, 220, 255)


def blend(
    image_HWC: NDArray[np.uint8],
    heatmap_HW: NDArray[np.floating],
    *,
    colormap: str = "inferno",
    alpha: float = 0.75,
    seen_HW: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Lay a heatmap over its picture, the stronger the hotter, so that the picture stays visible where the model did not look.

        opacity = alpha · heatmap^½

    Args:
        image_HWC: the picture.
        heatmap_HW: of the picture's size.
        colormap: a name in `COLORMAPS`.
        alpha: opacity where the heatmap is 1, in [0, 1].
        seen_HW: False where the model saw nothing, as outside of a crop; the picture is darkened there.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UsageError: the sizes differ, or there is no such colormap.
    """
    if colormap not in COLORMAPS:
        raise UsageError(f"there is no colormap {colormap!r}.{nearest(colormap, COLORMAPS)}")
    if image_HWC.shape[:2] != heatmap_HW.shape:
        raise UsageError(
            f"the heatmap is {heatmap_HW.shape} and the picture {image_HWC.shape[:2]}; carry the heatmap to the picture's pixels first"
        )
    colours, opacities = _colours(colormap, alpha)
    levels_HW = cv2.convertScaleAbs(np.ascontiguousarray(heatmap_HW, np.float32), alpha=255)
    heat_HWC = cv2.LUT(cv2.cvtColor(levels_HW, cv2.COLOR_GRAY2RGB), colours)
    opacity_HW = cv2.LUT(levels_HW, opacities)
    image_HWC = np.ascontiguousarray(image_HWC)
    if seen_HW is not None:
        image_HWC = np.where(seen_HW[..., None], image_HWC, image_HWC // 3)
    return cv2.blendLinear(heat_HWC, image_HWC, opacity_HW, 1 - opacity_HW)


def heat(heatmap_HW: NDArray[np.floating], *, colormap: str = "inferno") -> NDArray[np.uint8]:
    """The heatmap alone, in the colours of `blend`."""
    return blend(np.zeros((*heatmap_HW.shape, 3), np.uint8), heatmap_HW, colormap=colormap, alpha=1.0)


def draw_box(
    image_HWC: NDArray[np.uint8], box: Sequence[float], *, colour: tuple[int, int, int] = _BOX, thickness: int | None = None
) -> NDArray[np.uint8]:
    """Draw a box (xyxy) on a copy of a picture, its outer edge on the box's edge."""
    thickness = thickness or max(1, round(min(image_HWC.shape[:2]) / 200))
    drawn = image_HWC.copy()
    left, top, right, bottom = (round(edge) for edge in box)
    for inset in range(thickness):
        corner = (left + inset, top + inset), (right - 1 - inset, bottom - 1 - inset)
        cv2.rectangle(drawn, *corner, colour, 1)
    return drawn


@dataclass(frozen=True)
class Tile:
    """A picture of a sheet.

    Attributes:
        picture: (H, W, 3) uint8 RGB.
        caption: lines under it.
        right: whether the answer was right, which colours the first line; None for no colour.
        box: the true place of the object, xyxy in the picture's pixels.
    """

    picture: NDArray[np.uint8]
    caption: Sequence[str] = ()
    right: bool | None = None
    box: Sequence[float] | None = None


def sheet(tiles: Sequence[Tile], *, title: str = "", columns: int = 6, width: int = 200) -> NDArray[np.uint8]:
    """Arrange pictures in rows, each scaled to fit a square of `width` pixels, with its caption below.

    Raises:
        UsageError: there are no tiles.
    """
    if not tiles:
        raise UsageError("a sheet needs at least one picture")
    columns = min(columns, len(tiles))
    font, small = _font(15), _font(17)
    line, gap = 19, 14
    pictures = [_scaled(tile, width) for tile in tiles]
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    heights = [max(len(pictures[number]) for number in row) for row in rows]
    captions = [max(len(tiles[number].caption) for number in row) * line + 6 + gap for row in rows]
    head = 44 if title else gap
    page = Image.new("RGB", (gap + columns * (width + gap), head + sum(heights) + sum(captions)), _PAPER)
    pen = ImageDraw.Draw(page)
    if title:
        pen.text((gap, 13), _fit(title, small, page.width - 2 * gap), font=small, fill=_INK)
    y = head
    for row, height, caption in zip(rows, heights, captions, strict=True):
        for column, number in enumerate(row):
            tile, picture = tiles[number], pictures[number]
            x = gap + column * (width + gap)
            page.paste(Image.fromarray(picture), (x + (width - picture.shape[1]) // 2, y + (height - len(picture)) // 2))
            for count, text in enumerate(tile.caption):
                colour = _FAINT if count else {True: _RIGHT, False: _WRONG, None: _INK}[tile.right]
                pen.text((x, y + height + 6 + count * line), _fit(text, font, width), font=font, fill=colour)
        y += height + caption
    return np.array(page)


def _scaled(tile: Tile, width: int) -> NDArray[np.uint8]:
    height, wide = tile.picture.shape[:2]
    scale = width / max(height, wide)
    size = max(1, round(wide * scale)), max(1, round(height * scale))
    # small pictures keep their pixels visible; boxes are drawn afterwards, so that their lines stay thin
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST if scale >= 2 else cv2.INTER_CUBIC
    picture = cv2.resize(tile.picture, size, interpolation=interpolation)
    if tile.box is None:
        return picture
    return draw_box(picture, [edge * scale for edge in tile.box], thickness=2)


def _fit(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """Cut a text to a width. Pillow's own font knows ASCII only; other letters lose their accents or become `?`."""
    plain = unicodedata.normalize("NFKD", text.replace("—", "-").replace("–", "-"))
    text = "".join(letter for letter in plain if not unicodedata.combining(letter))
    text = text.encode("ascii", "replace").decode()
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}..") > width:
        text = text[:-1]
    return f"{text.rstrip()}.."


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


@lru_cache(maxsize=16)
def _colours(colormap: str, alpha: float) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """(1, 256, 3) RGB of every level, and the opacity of each."""
    levels = np.arange(256, dtype=np.uint8)[None]
    colours = cv2.applyColorMap(levels, COLORMAPS[colormap])[..., ::-1]
    opacities = np.float32(alpha) * np.sqrt(levels.astype(np.float32) / 255)
    return np.ascontiguousarray(colours), opacities
