"""Arrange pictures in rows and sheets, with captions.

Pictures are (H, W, 3) uint8 RGB and are not changed in place; heatmaps are (H, W) in [0, 1].
"""

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from visionattn.drawing.boxes import draw_box
from visionattn.drawing.fonts import FAINT, INK, PAPER, Colour, write
from visionattn.drawing.overlay import DIFFERENCE, blend, check_pair, heat
from visionattn.drawing.resizing import enlarge, shrink
from visionattn.errors import UsageError

_UNSEEN: Colour = (58, 58, 62)  # colour of pixels outside the model's input, in heatmaps without a picture


def colour_bar(height: int, *, width: int | None = None, colormap: str = "inferno") -> NDArray[np.uint8]:
    """Draw a vertical scale of a colormap, labelled 1, 0.5 and 0 from the top, or +1, 0 and −1 for `DIFFERENCE`.

    Args:
        height: height in pixels.
        width: width of the scale without its numbers, in pixels (default: chosen from the height).
        colormap: a name in `COLORMAPS`, or `DIFFERENCE`.

    Returns:
        (height, W, 3) uint8 RGB.
    """
    size = max(10, min(28, height // 22))
    bar = width or max(10, round(size * 0.9))
    ramp_HW = np.repeat(np.linspace(1, 0, height, dtype=np.float32)[:, None], bar, axis=1)
    page = Image.new("RGB", (bar + 6 + round(size * 1.8), height), PAPER)
    page.paste(Image.fromarray(heat(ramp_HW, colormap=colormap)), (0, 0))
    names = ("+1", "0", "−1") if colormap == DIFFERENCE else ("1", "0.5", "0")
    for text, y in zip(names, (0, (height - size) // 2, height - round(size * 1.15)), strict=True):
        write(page, (bar + 6, y), text, size=size, colour=FAINT, width=page.width)
    return np.array(page)


def side_by_side(
    image_HWC: NDArray[np.uint8],
    heatmap_HW: NDArray[np.floating],
    *,
    title: str = "",
    colormap: str = "inferno",
    alpha: float = 0.75,
    seen_HW: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Draw the picture, its overlay and the heatmap side by side, with a colour bar.

    Args:
        title: text above the row.
        image_HWC, heatmap_HW, colormap, alpha, seen_HW: as for `blend`.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UsageError: as for `blend`.
    """
    check_pair(image_HWC, heatmap_HW)
    overlay = blend(image_HWC, heatmap_HW, colormap=colormap, alpha=alpha, seen_HW=seen_HW)
    hot = heat(heatmap_HW, colormap=colormap)
    if seen_HW is not None:
        hot[~seen_HW] = _UNSEEN
    return row([(image_HWC, "image"), (overlay, "overlay"), (hot, "heatmap")], title=title, colormap=colormap)


def row(
    panels: Sequence[tuple[NDArray[np.uint8], str]], *, title: str = "", colormap: str = "inferno"
) -> NDArray[np.uint8]:
    """Draw pictures of equal size side by side, with a colour bar at the right.

    Small pictures are enlarged by a whole factor, so that the text below can be read.

    Args:
        panels: pictures, each with the line of text below it.
        title: text above the row.
        colormap: colormap of the colour bar.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = panels[0][0].shape[:2]
    scale = max(1, -(-240 // min(height, width)))
    shown = [(enlarge(panel, scale), name) for panel, name in panels]
    shown.append((colour_bar(height * scale, colormap=colormap), ""))
    size = max(12, min(40, height * scale // 24))
    gap = size
    head = size * 3 if title else gap
    wide = sum(panel.shape[1] + gap for panel, _ in shown)
    page = Image.new("RGB", (wide + gap, head + height * scale + round(size * 2.2)), PAPER)
    if title:
        write(page, (gap, round(size * 0.8)), title, size=round(size * 1.15), width=page.width - 2 * gap)
    x = gap
    for panel, name in shown:
        page.paste(Image.fromarray(panel), (x, head))
        write(page, (x, head + len(panel) + size // 3), name, size=size, colour=FAINT, width=panel.shape[1])
        x += panel.shape[1] + gap
    return np.array(page)


@dataclass(frozen=True)
class Tile:
    """One picture of a sheet.

    Attributes:
        picture: (H, W, 3) uint8 RGB.
        caption: lines below the picture, e.g. the prediction with its probability, and the true class.
        right: whether the prediction is correct. True draws a green tick before the first line, False draws a red
            cross, and None draws nothing.
        box: the true box of the object, xyxy in pixels of the picture.
    """

    picture: NDArray[np.uint8]
    caption: Sequence[str] = ()
    right: bool | None = None
    box: Sequence[float] | None = None


def sheet(
    tiles: Sequence[Tile], *, title: str = "", caption: str = "", columns: int = 6, width: int = 200
) -> NDArray[np.uint8]:
    """Arrange pictures in rows, each scaled to fit a square of `width` pixels, with its caption below.

    Pictures of at most half that size are enlarged by a whole factor, so that all their pixels become equal squares.

    Args:
        tiles: the pictures, at least one.
        title: text above the rows.
        caption: text below the rows.
        columns: largest number of pictures in a row.
        width: width of a tile, in pixels.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UsageError: there are no tiles, or no columns.
    """
    if not tiles or columns < 1:
        raise UsageError("a sheet needs at least one picture and one column")
    columns = min(columns, len(tiles))
    size, line, gap = 15, 20, 16
    pictures = [_scaled(tile, width) for tile in tiles]
    rows = [range(start, min(start + columns, len(tiles))) for start in range(0, len(tiles), columns)]
    heights = [max(len(pictures[number]) for number in row) for row in rows]
    below = [max(len(tiles[number].caption) for number in row) * line + gap + 2 for row in rows]
    head, foot = (46 if title else gap), (line + gap // 2 if caption else 0)
    page = Image.new("RGB", (gap + columns * (width + gap), head + sum(heights) + sum(below) + foot), PAPER)
    write(page, (gap, 14), title, size=18, colour=INK, width=page.width - 2 * gap)
    y = head
    for row, height, room in zip(rows, heights, below, strict=True):
        for column, number in enumerate(row):
            picture, x = pictures[number], gap + column * (width + gap)
            page.paste(
                Image.fromarray(picture), (x + (width - picture.shape[1]) // 2, y + (height - len(picture)) // 2)
            )
            for count, text in enumerate(tiles[number].caption):
                mark = count == 0 and tiles[number].right is not None
                start = x + (size + 3 if mark else 0)
                place = start, y + height + 5 + count * line
                write(page, place, text, size=size, colour=FAINT if count else INK, width=x + width - start)
                if mark:
                    _mark(page, (x, place[1] + 2), size, bool(tiles[number].right))
        y += height + room
    write(page, (gap, y), caption, size=size, colour=FAINT, width=page.width - 2 * gap)
    return np.array(page)


def _scaled(tile: Tile, width: int) -> NDArray[np.uint8]:
    """Scale a tile's picture to a longer side of about `width`, and draw the tile's box."""
    height, wide = tile.picture.shape[:2]
    scale = width / max(height, wide)
    if scale >= 2:  # a whole factor, so that all pixels become equal squares
        scale = int(scale)
        picture = enlarge(tile.picture, scale)
    elif scale >= 1:
        size = max(1, round(wide * scale)), max(1, round(height * scale))
        picture = np.asarray(cv2.resize(tile.picture, size, interpolation=cv2.INTER_CUBIC), np.uint8)
    else:
        picture = shrink(tile.picture, width)
    if tile.box is None:
        return picture
    # the box is drawn after scaling, so that its line stays thin
    return draw_box(picture, [edge * scale for edge in tile.box], thickness=2)


def _mark(page: Image.Image, xy: tuple[int, int], size: int, right: bool) -> None:
    """Draw a tick or a cross; colour-blind readers distinguish them by shape."""
    x, y = xy
    points = [[(1, 8), (5, 12), (13, 2)]] if right else [[(2, 2), (12, 12)], [(2, 12), (12, 2)]]
    pen = ImageDraw.Draw(page)
    for stroke in points:
        pen.line(
            [(x + a * size / 15, y + b * size / 15) for a, b in stroke], (110, 200, 120) if right else (240, 110, 90), 2
        )


def heat_of_range(map_hw: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Colour a map over its own range of values, (h, w, 3) uint8 RGB; a constant map is black."""
    low, high = float(map_hw.min()), float(map_hw.max())
    return heat((map_hw - low) / (high - low) if high > low else np.zeros_like(map_hw))


def heatmap_sheet(heatmaps_Bhw: NDArray[np.floating], title: str) -> NDArray[np.uint8]:
    """Draw a sheet of the heatmaps of the first 16 images of a batch, each coloured over its own range."""
    tiles = [Tile(heat_of_range(map_hw), [f"image {number}"]) for number, map_hw in enumerate(heatmaps_Bhw[:16])]
    return sheet(tiles, title=title, columns=4, width=180)
