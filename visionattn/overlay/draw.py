"""Heatmaps over pictures: NumPy and OpenCV, no torch.

Pictures are (H, W, 3) uint8 RGB and never changed in place; heatmaps (H, W) in [0, 1]; boxes xyxy in pixels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from visionattn.errors import UsageError, nearest
from visionattn.overlay.text import FAINT, INK, PAPER, Colour, fit, write

COLORMAPS = {
    name: getattr(cv2, f"COLORMAP_{name.upper()}")
    for name in ("inferno", "magma", "plasma", "viridis", "cividis", "turbo", "bone")
}
"""The first five are perceptually uniform and safe for the colour-blind; turbo and bone are for who is used to them."""

DIFFERENCE = "difference"
"""A colormap of signed values: blue below 0.5, orange above, nothing at 0.5; the colour-blind tell them apart."""

_BELOW, _ABOVE = (64, 150, 255), (255, 150, 30)

_PALETTE: tuple[Colour, ...] = ((80, 220, 255), (255, 176, 0), (220, 130, 255), (120, 230, 120), (255, 110, 110))
FOUND: Colour = _PALETTE[1]
"""Of boxes that a model found, where the true ones are drawn in the first colour."""

_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # of red, green and blue; ITU-R BT.601
_UNSEEN: Colour = (58, 58, 62)  # in a heatmap without its picture
_SHADE = 0.35  # brightness that is left of what the model never saw


def blend(
    image_HWC: NDArray[np.uint8],
    heatmap_HW: NDArray[np.floating],
    *,
    colormap: str = "inferno",
    alpha: float = 0.75,
    saturation: float = 0.45,
    seen_HW: NDArray[np.bool_] | None = None,
) -> NDArray[np.uint8]:
    """Lay a heatmap over its picture; the weaker the heat, the more of the picture shows.

        opacity = alpha · heatmap^½
        out = (1 − opacity) · (saturation · image + (1 − saturation) · grey) + opacity · colour(heatmap)

    The picture gives up some of its own colour, or a flame on a rose could not be told from the rose.

    Args:
        image_HWC: the picture.
        heatmap_HW: of the picture's size.
        colormap: a name in `COLORMAPS`, or `DIFFERENCE`, whose opacity is alpha · |2 · heatmap − 1|^½.
        alpha: opacity where the heatmap is 1, in [0, 1].
        saturation: share of the picture's own colour that is kept, in [0, 1].
        seen_HW: False where the model saw nothing, as outside of a crop; the picture is dark and grey there.

    Returns:
        (H, W, 3) uint8 RGB; at 256 levels of heat within 2 of the equation, and all but one value in 1,000 within 1 of
        the equation once rounded.

    Raises:
        UsageError: the sizes differ, a number is out of range, or there is no such colormap.
    """
    for name, number in (("alpha", alpha), ("saturation", saturation)):
        if not 0 <= number <= 1:
            raise UsageError(f"{name} must be in [0, 1], got {number}")
    check_pair(image_HWC, heatmap_HW)
    heat_L13, share_L13 = _premultiplied(colormap, float(alpha))
    out_HWC = np.empty_like(image_HWC, order="C")
    for rows in _bands(image_HWC):
        base_HWC = _muted(image_HWC[rows], saturation, 1.0)
        levels_HW = _levels(heatmap_HW[rows])
        if seen_HW is not None and not seen_HW[rows].all():
            cv2.copyTo(shade(image_HWC[rows]), np.logical_not(seen_HW[rows]).view(np.uint8), base_HWC)
            levels_HW = np.where(seen_HW[rows], levels_HW, np.uint8(128 if colormap == DIFFERENCE else 0))
        # fixed point: base · share / 255 + heat, where share and heat are looked up by level
        cv2.multiply(base_HWC, cv2.applyColorMap(levels_HW, share_L13), dst=out_HWC[rows], scale=1 / 255)
        cv2.add(out_HWC[rows], cv2.applyColorMap(levels_HW, heat_L13), dst=out_HWC[rows])
    return out_HWC


def heat(heatmap_HW: NDArray[np.floating], *, colormap: str = "inferno") -> NDArray[np.uint8]:
    """The heatmap alone, in the colours of `blend`."""
    return np.asarray(cv2.applyColorMap(_levels(heatmap_HW), _premultiplied(colormap, None)[0]), np.uint8)


def contour(
    image_HWC: NDArray[np.uint8],
    heatmap_HW: NDArray[np.floating],
    *,
    levels: Sequence[float] = (0.5,),
    colour: Colour = (255, 255, 255),
    thickness: int | None = None,
) -> NDArray[np.uint8]:
    """Draw the lines where a heatmap passes some levels in (0, 1], with a dark rim that shows on bright ground."""
    check_pair(image_HWC, heatmap_HW)
    thickness = thickness or line_width(image_HWC)
    drawn = np.array(image_HWC, order="C")  # OpenCV draws on no other
    for level in levels:
        above_HW = np.greater_equal(heatmap_HW, level).astype(np.uint8)
        lines, _ = cv2.findContours(above_HW, cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
        for width, shade in ((thickness + 2, (0, 0, 0)), (thickness, colour)):
            cv2.drawContours(drawn, lines, -1, shade, width, cv2.LINE_AA)
    return drawn


def shade(image_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The picture dark and grey, as where a model saw nothing."""
    return _muted(image_HWC, 0.0, _SHADE)


def top(heatmap_HW: NDArray[np.floating], share: float) -> NDArray[np.bool_]:
    """Which pixels are the hottest `share` of all, in (0, 1]; more where several are equal, none where all are."""
    if not 0 < share <= 1:
        raise UsageError(f"the share of hottest pixels must be in (0, 1], got {share}")
    flat = np.asarray(heatmap_HW).ravel()
    place = flat.size - max(1, round(share * flat.size))
    return (heatmap_HW >= np.partition(flat, place)[place]) & (heatmap_HW > flat.min())


def top_mask(
    image_HWC: NDArray[np.uint8], heatmap_HW: NDArray[np.floating], *, share: float = 0.2
) -> NDArray[np.uint8]:
    """Show the hottest `share` of the pixels as they are, and the others dark and grey."""
    check_pair(image_HWC, heatmap_HW)
    drawn = shade(image_HWC)
    cv2.copyTo(np.ascontiguousarray(image_HWC), top(heatmap_HW, share).view(np.uint8), drawn)
    return drawn


def draw_box(
    image_HWC: NDArray[np.uint8], box: Sequence[float], *, colour: Colour = _PALETTE[0], thickness: int | None = None
) -> NDArray[np.uint8]:
    """Draw a box (xyxy) on a copy of a picture: its outer edge on the box's edge, a dark rim inside."""
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
    """Draw a box as `draw_box` does, in place; what lies outside of the picture is not seen."""
    left, upper, right, lower = (round(float(edge)) for edge in box)
    for inset in range(thickness + rim):
        corners = (left + inset, upper + inset), (right - 1 - inset, lower - 1 - inset)
        if corners[1][0] < corners[0][0] or corners[1][1] < corners[0][1]:
            break
        cv2.rectangle(drawn, *corners, colour if inset < thickness else (0, 0, 0), 1)


def label(
    image_HWC: NDArray[np.uint8], text: str, *, place: tuple[int, int] = (0, 0), colour: Colour = _PALETTE[0]
) -> NDArray[np.uint8]:
    """Write a line on a copy of a picture, on a ground of its own; its left upper corner at (x, y)."""
    page = Image.fromarray(image_HWC)
    _label(page, text, place, colour, _text_size(image_HWC))
    return np.array(page)


def boxes(
    image_HWC: NDArray[np.uint8],
    boxes_N4: Sequence[Sequence[float]] | NDArray[np.floating],
    *,
    labels: Sequence[str] = (),
    colours: Sequence[Colour] = _PALETTE,
) -> NDArray[np.uint8]:
    """Draw boxes with their labels, which stand above a box, or inside where there is no room above.

    Raises:
        UsageError: there are labels, but not one a box.
    """
    if len(labels) not in (0, len(boxes_N4)):
        raise UsageError(f"{len(labels)} labels for {len(boxes_N4)} boxes; give one a box, or none")
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


def fitted(
    image_HWC: NDArray[np.uint8], boxes: NDArray[np.floating], side: int
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Bring a picture and its boxes (…, 4) to the size that is to be drawn on, so that lines and text are sharp.

    The longer side becomes `side`; a small picture is enlarged by a whole number, as far as `side` allows.
    """
    height, width = image_HWC.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        scale = int(scale)
        return image_HWC.repeat(scale, 0).repeat(scale, 1), np.asarray(boxes, np.float64) * scale
    size = max(1, round(width * scale)), max(1, round(height * scale))
    small = np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)
    return small, np.asarray(boxes, np.float64) * (np.array(size * 2) / (width, height, width, height))


def _label(page: Image.Image, text: str, place: tuple[int, int], colour: Colour, size: int) -> None:
    font, line = fit(text, size=size, width=page.width - 8)
    wide, high = round(font.getlength(line)) + 8, round(size * 1.35)
    x, y = max(0, min(place[0], page.width - wide)), place[1]
    page.paste(colour, (x, y, x + wide, y + high))
    write(page, (x + 4, y + round(size * 0.08)), line, size=size, colour=PAPER, width=wide)


def _text_size(image_HWC: NDArray[np.uint8]) -> int:
    return max(10, min(40, round(min(image_HWC.shape[:2]) / 28)))


def colour_bar(height: int, *, width: int | None = None, colormap: str = "inferno") -> NDArray[np.uint8]:
    """An upright scale of the heat's colours, 1 at the top (of `DIFFERENCE` +1), with its ends and middle named."""
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
    """Put the picture, its overlay and the heatmap alone beside each other, with a colour bar; as `blend` otherwise."""
    check_pair(image_HWC, heatmap_HW)
    overlay = blend(image_HWC, heatmap_HW, colormap=colormap, alpha=alpha, seen_HW=seen_HW)
    hot = heat(heatmap_HW, colormap=colormap)
    if seen_HW is not None:
        hot[~seen_HW] = _UNSEEN
    return row([(image_HWC, "image"), (overlay, "overlay"), (hot, "heatmap")], title=title, colormap=colormap)


def row(
    panels: Sequence[tuple[NDArray[np.uint8], str]], *, title: str = "", colormap: str = "inferno"
) -> NDArray[np.uint8]:
    """Put pictures of equal size beside each other, a line below each, and a colour bar behind the last.

    Small pictures are enlarged by a whole number, so that the text below them can be read.
    """
    height, width = panels[0][0].shape[:2]
    scale = max(1, -(-240 // min(height, width)))
    shown = [(panel.repeat(scale, 0).repeat(scale, 1), name) for panel, name in panels]
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
    """A picture of a sheet.

    Attributes:
        picture: (H, W, 3) uint8 RGB.
        caption: lines under it, as the prediction with its probability, and the truth.
        right: whether the answer was right: a green tick or a red cross before the first line; None for neither.
        box: the true place of the object, xyxy in the picture's pixels.
    """

    picture: NDArray[np.uint8]
    caption: Sequence[str] = ()
    right: bool | None = None
    box: Sequence[float] | None = None


def sheet(
    tiles: Sequence[Tile], *, title: str = "", caption: str = "", columns: int = 6, width: int = 200
) -> NDArray[np.uint8]:
    """Arrange pictures in rows, each scaled to a square of `width` pixels, with its caption below.

    Pictures of less than half that size are enlarged by a whole number, each pixel a square.

    Args:
        tiles: at least one.
        title: above all.
        caption: below all.
        columns: pictures a row.
        width: of a tile, in pixels.

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


def line_width(image_HWC: NDArray[np.uint8]) -> int:
    """How thick a line shows well on a picture, in pixels."""
    return max(1, round(min(image_HWC.shape[:2]) / 160))


def check_pair(image_HWC: NDArray[np.uint8], heatmap_HW: NDArray[np.floating]) -> None:
    """Raise where a heatmap does not belong to a picture."""
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3:
        raise UsageError(f"a picture is (H, W, 3) uint8 RGB, got {image_HWC.shape} {image_HWC.dtype}")
    if image_HWC.shape[:2] != heatmap_HW.shape:
        raise UsageError(
            f"the heatmap is {heatmap_HW.shape} and the picture {image_HWC.shape[:2]}; "
            "carry the heatmap to the picture's pixels first (Placement.carry)"
        )


def _bands(image_HWC: NDArray[np.uint8]) -> list[slice]:
    """Rows to work on at a time: as many as stay in cache, and below the size where malloc asks the system for pages.

    *Measured*: 640 × 480 takes 1.7 ms in bands and 4.2 ms at once, on a busy machine.
    """
    height, width = image_HWC.shape[:2]
    step = max(1, 24_000 // max(1, width))
    return [slice(start, start + step) for start in range(0, height, step)]


def _levels(heatmap_HW: NDArray[np.floating]) -> NDArray[np.uint8]:
    """0 … 255; what is below 0 counts as 0."""
    return np.asarray(cv2.convertScaleAbs(np.maximum(heatmap_HW, np.float32(0), dtype=np.float32), alpha=255), np.uint8)


def _muted(image_HWC: NDArray[np.uint8], saturation: float, brightness: float) -> NDArray[np.uint8]:
    """A copy with less colour and light."""
    weights_33 = np.float32(saturation) * np.eye(3, dtype=np.float32) + np.float32(1 - saturation) * _LUMA
    return np.asarray(cv2.transform(np.ascontiguousarray(image_HWC), brightness * weights_33), np.uint8)


@lru_cache(maxsize=16)
def _premultiplied(colormap: str, alpha: float | None) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Colour · opacity and 255 · (1 − opacity) of every level, (256, 1, 3) each; where alpha is None all is opaque."""
    levels = np.arange(256, dtype=np.uint8)[:, None]
    if colormap == DIFFERENCE:
        strength = np.maximum(np.abs(levels - 127.5) - 0.5, 0)[..., None] / 127  # 127 and 128 are both zero
        colours = np.where(levels[..., None] < 128, _BELOW, _ABOVE)
        if alpha is None:  # without a picture, on the ground of our pages
            colours = np.rint(PAPER + (colours - np.asarray(PAPER)) * np.sqrt(strength))
    elif colormap in COLORMAPS:
        strength = levels[..., None] / 255
        colours = cv2.applyColorMap(levels, COLORMAPS[colormap])[..., ::-1]
    else:
        raise UsageError(
            f"there is no colormap {colormap!r}; there are {', '.join(COLORMAPS)}.{nearest(colormap, COLORMAPS)}"
        )
    opacity = np.ones((256, 1, 1)) if alpha is None else alpha * np.sqrt(strength)
    share = np.repeat(np.rint(255 * (1 - opacity)), 3, axis=2)
    return np.ascontiguousarray(np.rint(colours * opacity), np.uint8), np.ascontiguousarray(share, np.uint8)


def _scaled(tile: Tile, width: int) -> NDArray[np.uint8]:
    height, wide = tile.picture.shape[:2]
    scale = width / max(height, wide)
    picture = tile.picture
    if scale >= 2:  # keep every pixel visible and of equal size
        scale = int(scale)
        picture = picture.repeat(scale, 0).repeat(scale, 1)
    else:
        size = max(1, round(wide * scale)), max(1, round(height * scale))
        smooth = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
        picture = np.asarray(cv2.resize(picture, size, interpolation=smooth), np.uint8)
    if tile.box is None:
        return picture  # boxes come after, so that their lines stay thin
    return draw_box(picture, [edge * scale for edge in tile.box], thickness=2)


def _mark(page: Image.Image, xy: tuple[int, int], size: int, right: bool) -> None:
    """A tick or a cross: told apart by shape, not by colour alone."""
    x, y = xy
    points = [[(1, 8), (5, 12), (13, 2)]] if right else [[(2, 2), (12, 12)], [(2, 12), (12, 2)]]
    pen = ImageDraw.Draw(page)
    for stroke in points:
        pen.line(
            [(x + a * size / 15, y + b * size / 15) for a, b in stroke], (110, 200, 120) if right else (240, 110, 90), 2
        )
