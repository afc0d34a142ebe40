"""Text on pictures is cut to its width, which Pillow measures."""

import os

import numpy as np
import pytest
from PIL import Image

from visionattn.drawing.fonts import fit, write

NOT_TEXT = os.fsdecode(b"caf\xe9")  # Latin-1, not valid UTF-8


@pytest.mark.parametrize("width", [0, 3, 20, 77, 200, 1000])
@pytest.mark.parametrize("text", ["golden retriever 98 %", "w" * 300, "", "a"])
def test_a_line_is_cut_to_the_longest_start_that_fits_its_width(text, width):
    font, line = fit(text, size=15, width=width)
    assert font.getlength(line) <= width
    if line != text:
        starts = [f"{text[:count].rstrip()}…" for count in range(len(text))]
        fitting = [start for start in starts if font.getlength(start) <= width]
        assert line == (fitting[-1] if fitting else "")


def test_a_line_one_pixel_too_wide_loses_one_letter():
    font, line = fit("w" * 20, size=15, width=1000)
    assert fit(line, size=15, width=int(font.getlength(line)) - 1)[1] == "w" * 19 + "…"


def test_invalid_bytes_and_letters_that_no_font_has_become_question_marks():
    assert fit(NOT_TEXT, size=15, width=500)[1] == "caf?"
    assert fit("x \U000f0000 y", size=15, width=500)[1] in ("x ? y", "x y")  # a private-use letter
    assert fit("a\nb\tc\x07", size=15, width=500)[1] == "a b c"


def test_a_letter_keeps_or_loses_its_accent_but_never_becomes_a_question_mark():
    line = fit("Cà Phê", size=15, width=500)[1]
    assert len(line) == 6
    assert "?" not in line


def test_write_changes_only_the_pixels_of_the_text():
    page = Image.new("RGB", (200, 60))
    write(page, (50, 20), "cat " * 50, size=15, width=100)
    rows, columns = np.nonzero(np.array(page).any(2))
    assert len(rows)
    assert 48 <= columns.min() <= columns.max() <= 152
    assert 18 <= rows.min() <= rows.max() <= 42
