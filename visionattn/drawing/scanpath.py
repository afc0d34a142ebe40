"""Draw glimpses: their path over an image, an animation, and the density of fixations over a data set.

Shapes: T glimpses, S scales, h × w values of a patch, K classes, H × W pixels.
Boxes are xyxy in pixels of the picture, the finest scale first. Boxes may reach beyond the picture.
"""

import itertools
import math
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from visionattn.data import Placement
from visionattn.drawing.boxes import fit_to_side, outline
from visionattn.drawing.fonts import FAINT, INK, PAPER, Colour, fit, write
from visionattn.drawing.overlay import heat
from visionattn.drawing.sheets import Tile, sheet
from visionattn.errors import UsageError

_SIDE = 448  # pixels of the longer side of a picture, so that the numbers on it can be read
_UNSEEN = 0.3, 40  # unread pixels are drawn as 0.3 · grey + 40, so that black unread pixels are not black
_CLASSES = 5  # largest number of classes whose probabilities an animation shows


def boxes_in_source(boxes_TS4: NDArray[np.floating], placement: Placement) -> NDArray[np.float64]:
    """Convert boxes from pixels of the model's input to pixels of the source.

    Boxes are not clipped at the edges of the source, so that their centres stay correct.

    Shape: (…, 4) → the same.
    """
    corners = np.asarray(boxes_TS4, np.float64)[..., [[0, 1], [2, 1], [0, 3], [2, 3]]]
    moved = placement.to_source(corners.reshape(-1, 2)).reshape(corners.shape)
    return np.concatenate([moved.min(-2), moved.max(-2)], -1)


def centres(boxes_TS4: NDArray[np.floating]) -> NDArray[np.float64]:
    """Return the location of each glimpse, (T, 2) xy: the centre of its finest box."""
    finest_T4 = np.asarray(boxes_TS4, np.float64)[:, 0]
    return (finest_T4[:, :2] + finest_T4[:, 2:]) / 2


def draw_scanpath(
    image_HWC: NDArray[np.uint8], boxes_TS4: NDArray[np.floating], *, side: int | None = None
) -> NDArray[np.uint8]:
    """Draw the path of the glimpses: numbers in temporal order, a ring around the first, and the box of every scale.

    Colours run from violet for the first glimpse to yellow for the last. The finest box has a bold line; the wider
    boxes have thinner and fainter lines. A number is drawn on its fixation. If another number is already there, the
    number is drawn next to the fixation, with a connecting line.

    Args:
        image_HWC: (H, W, 3) uint8 RGB.
        boxes_TS4: box of each glimpse at each scale.
        side: limit on the longer side of the result, in pixels (default: 448, or the picture's longer side if that is
            larger). Smaller pictures are enlarged by an integer factor.

    Returns:
        (H', W', 3) uint8 RGB.

    Raises:
        UsageError: the picture or the boxes have a wrong shape or are empty.
    """
    picture, boxes_TS4 = _fitted(image_HWC, boxes_TS4, side)
    drawn = np.array(picture, order="C")
    unit = _unit(drawn)
    colours = _ramp(len(boxes_TS4))
    for scale in reversed(range(boxes_TS4.shape[1])):
        for box, colour in zip(boxes_TS4[:, scale], colours, strict=True):
            fainter = (1.0, 0.85, 0.5)[min(scale, 2)]
            shade = round(fainter * colour[0]), round(fainter * colour[1]), round(fainter * colour[2])
            outline(drawn, box, shade, round(unit * (1 if scale else 2)), rim=not scale)
    points = centres(boxes_TS4)
    _lines(drawn, list(itertools.pairwise(points)), colours[1:], unit)
    return _numbered(drawn, points, colours, unit)


def animate_glimpses(
    image_HWC: NDArray[np.uint8],
    boxes_TS4: NDArray[np.floating],
    patches_TShw3: NDArray[np.uint8],
    *,
    probabilities_TK: NDArray[np.floating] | None = None,
    class_names: Sequence[str] = (),
    truth: int | None = None,
    side: int = _SIDE,
) -> list[NDArray[np.uint8]]:
    """Animate the glimpses: the patches read so far, as sharp as they were read, and the class probabilities.

    The rest of the picture is grey. Each frame shows the boxes of its glimpse and the path so far. A panel shows the
    probabilities of up to five classes: the classes with the highest probability after any glimpse, and always the true
    class if `truth` is given. The classes have the same order in all frames.

    Args:
        image_HWC: (H, W, 3) uint8 RGB.
        boxes_TS4: box of each glimpse at each scale.
        patches_TShw3: uint8 RGB, the pixels that were read in each box.
        probabilities_TK: class probabilities after each glimpse (default: none, and no panel).
        class_names: K names; without names, the panel shows class indices.
        truth: index of the true class, which is marked (default: none is marked).
        side: as in `draw_scanpath`, for the picture without the panel (default: 448).

    Returns:
        T frames, (H', W', 3) uint8 RGB, for `data.write_animation`.
    """
    picture, boxes_TS4 = _fitted(image_HWC, boxes_TS4, side)
    factor, offset = _UNSEEN
    grey = cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)
    shown = (factor * grey + offset).astype(np.uint8)[..., None].repeat(3, 2)
    # finest scale at which a pixel was read; S if it is unread
    sharpness = np.full(shown.shape[:2], boxes_TS4.shape[1])
    unit = _unit(picture)
    colours, points = _ramp(len(boxes_TS4)), centres(boxes_TS4)
    frames = []
    for turn, boxes_S4 in enumerate(boxes_TS4):
        for scale in reversed(range(len(boxes_S4))):
            _paste(shown, sharpness, patches_TShw3[turn, scale], boxes_S4[scale], scale)
        frame = shown.copy()
        for scale in reversed(range(len(boxes_S4))):
            outline(frame, boxes_S4[scale], colours[turn], round(unit * (1 if scale else 2)), rim=not scale)
        _lines(frame, [(points[k], points[k + 1]) for k in range(turn)], colours[1:], unit)
        if probabilities_TK is not None:
            panel = _belief(frame.shape[0], turn, np.asarray(probabilities_TK), class_names, truth)
            frame = _beside(frame, panel)
        frames.append(frame)
    return frames


def draw_fixation_density(
    maps: Mapping[str, NDArray[np.floating]], *, title: str = "", caption: str = ""
) -> NDArray[np.uint8]:
    """Draw maps of how often glimpses read each pixel, side by side, with their largest values below.

    Args:
        maps: name → (H, W) ≥ 0 over the model's input, e.g. the mean number of glimpses that read a pixel at the finest
            scale. 0 is drawn black.
        title: text above the maps.
        caption: text below the maps.

    Returns:
        (H', W', 3) uint8 RGB.
    """
    tiles = []
    for name, map_HW in maps.items():
        largest = float(map_HW.max())
        shown = heat(map_HW / largest if largest > 0 else map_HW)
        tiles.append(Tile(shown, [name, f"at most {largest:.3g} an image"]))
    return sheet(tiles, title=title, caption=caption, columns=len(tiles), width=300)


def _fitted(
    image_HWC: NDArray[np.uint8], boxes_TS4: NDArray[np.floating], side: int | None
) -> tuple[NDArray[np.uint8], NDArray[np.float64]]:
    """Check the picture and the boxes, and resize both for drawing."""
    if image_HWC.dtype != np.uint8 or image_HWC.ndim != 3 or image_HWC.shape[2] != 3 or not image_HWC.size:
        raise UsageError(f"a picture is (H, W, 3) uint8 RGB, got {image_HWC.shape} {image_HWC.dtype}")
    if boxes_TS4.ndim != 3 or boxes_TS4.shape[2] != 4 or not boxes_TS4.size:
        raise UsageError(f"boxes of glimpses are (T, S, 4), got {boxes_TS4.shape}")
    return fit_to_side(image_HWC, boxes_TS4, side or max(_SIDE, *image_HWC.shape[:2]))


def _unit(picture: NDArray[np.uint8]) -> float:
    """Return the unit of length for drawing, in pixels: the longer side / 448, at least 0.75."""
    return max(0.75, max(picture.shape[:2]) / _SIDE)


def _ramp(count: int) -> list[Colour]:
    """Return bright colours from violet to yellow."""
    levels = np.linspace(75, 250, count).round().astype(np.uint8)[:, None]
    return [(int(r), int(g), int(b)) for b, g, r in cv2.applyColorMap(levels, cv2.COLORMAP_PLASMA)[:, 0]]


def _lines(
    drawn: NDArray[np.uint8],
    ends: Sequence[tuple[NDArray[np.float64], NDArray[np.float64]]],
    colours: Sequence[Colour],
    unit: float,
) -> None:
    """Draw lines with a dark rim; their ends are exact to a sixteenth of a pixel."""
    for (start, end), colour in zip(ends, colours, strict=False):
        a, b = (tuple(int(v) for v in np.rint(16 * (point - 0.5))) for point in (start, end))
        width = max(1, round(2 * unit))
        cv2.line(drawn, a, b, PAPER, width + 2, cv2.LINE_AA, 4)
        cv2.line(drawn, a, b, colour, width, cv2.LINE_AA, 4)


def _numbered(
    drawn: NDArray[np.uint8], points_T2: NDArray[np.float64], colours: Sequence[Colour], unit: float
) -> NDArray[np.uint8]:
    radius = 9 * unit
    places = _apart(points_T2, radius, drawn.shape[1], drawn.shape[0])
    _lines(drawn, list(zip(points_T2, places, strict=True)), [INK] * len(places), unit / 2)
    page = Image.fromarray(drawn)
    pen = ImageDraw.Draw(page)
    for number in reversed(range(len(places))):  # the first number is drawn last, on top
        (x, y), colour = places[number] - 0.5, colours[number]  # Pillow's origin is the centre of the first pixel
        rings: list[tuple[float, Colour]] = [(radius, colour)]
        if number == 0:
            rings = [(radius + 3 * unit, INK), (radius + 1.5 * unit, PAPER), *rings]
        for size, shade in [(rings[0][0] + unit, PAPER), *rings]:
            pen.ellipse([x - size, y - size, x + size, y + size], fill=shade)
        font, text = fit(str(number + 1), size=round(13 * unit), width=round(4 * radius))
        left, top, right, bottom = font.getbbox(text)
        bright = sum(colour) > 330
        pen.text((x - (left + right) / 2, y - (top + bottom) / 2), text, font=font, fill=PAPER if bright else INK)
    return np.array(page)


def _apart(points_T2: NDArray[np.float64], radius: float, width: int, height: int) -> NDArray[np.float64]:
    """Place a disc for each point so that no discs overlap: on the point, or at the nearest free position."""
    places: list[NDArray[np.float64]] = []
    edge = np.array([width, height], np.float64)
    for point in points_T2:
        options = [point]
        for ring in range(1, 8):
            angles = 2 * math.pi * np.arange(8 * ring) / (8 * ring)
            options += [point + 1.1 * ring * radius * np.array([math.cos(a), -math.sin(a)]) for a in angles]
        for option in options:
            inside = np.clip(option, np.minimum(radius, edge / 2), np.maximum(edge - radius, edge / 2))
            if all(np.hypot(*(inside - place)) >= 2.1 * radius for place in places):
                break
        else:
            inside = point  # no free position
        places.append(inside)
    return np.array(places)


def _paste(
    shown: NDArray[np.uint8],
    sharpness: NDArray[np.int_],
    patch_hw3: NDArray[np.uint8],
    box: NDArray[np.float64],
    scale: int,
) -> None:
    """Draw a patch into its box, except over pixels that were read at a finer scale."""
    (height, width), (left, top, right, bottom) = patch_hw3.shape[:2], box
    y, x = np.arange(len(shown)) + 0.5, np.arange(shown.shape[1]) + 0.5
    rows, columns = np.flatnonzero((y > top) & (y < bottom)), np.flatnonzero((x > left) & (x < right))
    i = ((y[rows] - top) * (height / (bottom - top))).astype(int).clip(0, height - 1)
    j = ((x[columns] - left) * (width / (right - left))).astype(int).clip(0, width - 1)
    box_pixels = np.ix_(rows, columns)
    replaced = sharpness[box_pixels] >= scale
    shown[box_pixels] = np.where(replaced[..., None], patch_hw3[np.ix_(i, j)], shown[box_pixels])
    sharpness[box_pixels] = np.minimum(sharpness[box_pixels], scale)


def _belief(
    height: int, turn: int, probabilities_TK: NDArray[np.floating], class_names: Sequence[str], truth: int | None
) -> NDArray[np.uint8]:
    """Draw the panel of class probabilities after glimpse `turn`."""
    size = max(11, min(30, height // 22))
    width, row = 13 * size, round(size * 2.3)
    page = Image.new("RGB", (width, height), PAPER)
    write(page, (0, 0), f"glimpse {turn + 1} of {len(probabilities_TK)}", size=round(1.15 * size), width=width)
    count = min(_CLASSES, probabilities_TK.shape[1], max(1, (height - 2 * size) // row))
    order = np.argsort(-probabilities_TK.max(0), kind="stable")[:count].tolist()
    if truth is not None and truth not in order:
        order[-1] = truth
    likeliest = int(probabilities_TK[turn].argmax())
    pen = ImageDraw.Draw(page)
    for place, index in enumerate(order):
        y = 2 * size + place * row
        name = class_names[index] if class_names else str(index)
        value = float(probabilities_TK[turn, index])
        colour = INK if index == likeliest else FAINT
        write(page, (0, y), f"{name} (right)" if index == truth else name, size=size, colour=colour, width=9 * size)
        write(page, (10 * size, y), f"{value:.2f}", size=size, colour=colour, width=3 * size)
        bar = y + round(1.3 * size), y + round(1.7 * size)
        pen.rectangle([0, bar[0], width - 1, bar[1]], fill=(52, 52, 56))
        if value > 0:
            pen.rectangle([0, bar[0], round(value * (width - 1)), bar[1]], fill=colour)
    return np.array(page)


def _beside(frame: NDArray[np.uint8], panel: NDArray[np.uint8]) -> NDArray[np.uint8]:
    gap = max(8, len(frame) // 40)
    page = np.full((len(frame) + 2 * gap, frame.shape[1] + panel.shape[1] + 3 * gap, 3), PAPER, np.uint8)
    page[gap : gap + len(frame), gap : gap + frame.shape[1]] = frame
    page[gap : gap + len(panel), frame.shape[1] + 2 * gap : -gap] = panel
    return page
