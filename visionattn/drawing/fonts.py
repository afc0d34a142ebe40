"""Write text on pictures, in a font that has all letters, and cut lines that are too long."""

import unicodedata
from collections.abc import Iterator
from functools import lru_cache
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont

Colour: TypeAlias = tuple[int, int, int]
Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont

INK: Colour = (236, 236, 236)
FAINT: Colour = (158, 158, 158)
PAPER: Colour = (24, 24, 27)

# Pillow's own font has few letters beyond ASCII. For other letters, the first installed font that has them is used.
_WIDER_FONTS = (
    "DejaVuSans.ttf",
    "NotoSans-Regular.ttf",
    "LiberationSans-Regular.ttf",
    "Arial Unicode.ttf",
    "arial.ttf",
    "NotoSansCJK-Regular.ttc",
    "msyh.ttc",
    "PingFang.ttc",
)


def write(page: Image.Image, xy: tuple[int, int], text: str, *, size: int, colour: Colour = INK, width: int) -> None:
    """Write one line on a page, in place.

    Args:
        page: the picture.
        xy: upper left corner in pixels.
        text: one line. A line wider than `width` is cut and ends in ….
        size: font size in pixels.
        colour: RGB.
        width: largest width of the line in pixels.
    """
    font, line = fit(text, size=size, width=width)
    ImageDraw.Draw(page).text(xy, line, font=font, fill=colour)


def fit(text: str, *, size: int, width: int) -> tuple[Font, str]:
    """Choose a font that has the letters of a text, and cut the text to a width.

    A letter that the chosen font lacks loses its accent or becomes `?`. A byte of a file name that is not valid text
    becomes `?`.

    Args:
        text: one line.
        size: font size in pixels.
        width: largest width of the text in pixels.

    Returns:
        The font, and the text to draw. A text that is too wide is cut and ends in …, or is "" if not even … fits.
    """
    text = " ".join("".join(letter if letter.isprintable() or _is_byte(letter) else " " for letter in text).split())
    font, text = _legible(text, size)
    if font.getlength(text) <= width:
        return font, text
    keep, drop = 0, len(text)  # bisection: `keep` letters and … fit, `drop` letters do not
    while drop - keep > 1:
        middle = (keep + drop) // 2
        keep, drop = (middle, drop) if font.getlength(f"{text[:middle].rstrip()}…") <= width else (keep, middle)
    cut = f"{text[:keep].rstrip()}…"
    return font, cut if font.getlength(cut) <= width else ""


def _legible(text: str, size: int) -> tuple[Font, str]:
    """Return the first font that has the most letters, and the text with missing letters replaced."""
    letters = set(text)
    best, most = _own_font(size), -1
    for font in _fonts(size):
        has = sum(_draws(font, letter) for letter in letters)
        if has > most:
            best, most = font, has
        if has == len(letters):
            return font, text
    return best, "".join(letter if _draws(best, letter) else _plain(best, letter) for letter in text)


def _plain(font: Font, letter: str) -> str:
    base = unicodedata.normalize("NFKD", letter)
    return "".join(part if _draws(font, part) else "?" for part in base if not unicodedata.combining(part))


def _fonts(size: int) -> Iterator[Font]:
    yield _own_font(size)
    for name in _WIDER_FONTS:
        font = _installed(name, size)
        if font is not None:
            yield font


@lru_cache(maxsize=32)
def _own_font(size: int) -> Font:
    return ImageFont.load_default(size)


@lru_cache(maxsize=128)
def _installed(name: str, size: int) -> Font | None:
    try:
        return ImageFont.truetype(name, size)
    except OSError:
        return None


@lru_cache(maxsize=8192)
def _draws(font: Font, letter: str) -> bool:
    """Return whether a font has a letter. Fonts draw missing letters as a box, so the drawing must not be this box."""
    if letter == " ":
        return True
    if not letter.isprintable():
        return False
    drawn, missing = font.getmask(letter), font.getmask("\uffff")
    return (drawn.size, bytes(drawn)) != (missing.size, bytes(missing))


def _is_byte(letter: str) -> bool:
    """Return whether a letter stands for a byte of a file name that is not valid text."""
    return "\udc80" <= letter <= "\udcff"
