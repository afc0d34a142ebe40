"""Sheets and rows of pictures with captions and a colour bar."""

import numpy as np
import pytest

from tests.drawing.pictures import colour_of, picture, ramp
from visionattn import drawing
from visionattn.drawing.sheets import Tile


@pytest.mark.parametrize("height", [1, 10, 300])
def test_a_colour_bar_is_hottest_at_the_top_and_coldest_at_the_bottom(height):
    bar = drawing.colour_bar(height, width=12)
    assert len(bar) == height
    np.testing.assert_array_equal(bar[0, :12], np.tile(colour_of(255, "inferno"), (12, 1)))
    if height > 1:
        np.testing.assert_array_equal(bar[-1, :12], np.tile(colour_of(0, "inferno"), (12, 1)))


def test_side_by_side_shows_the_picture_its_overlay_and_the_heatmap():
    image, heatmap = picture(240, 260), ramp(240, 260)
    page = drawing.side_by_side(image, heatmap)
    for panel in (image, drawing.blend(image, heatmap), drawing.heat(heatmap)):
        hits = [x for x in range(page.shape[1] - 260) if np.array_equal(page[12:252, x : x + 260], panel)]
        assert len(hits) == 1


def test_side_by_side_enlarges_small_pictures_and_fills_pixels_outside_the_input():
    image, heatmap = picture(8, 10), ramp(8, 10)
    seen = np.ones((8, 10), bool)
    seen[:, 7:] = False
    page = drawing.side_by_side(image, heatmap, seen_HW=seen, title="cat 98 %")
    large = image.repeat(30, 0).repeat(30, 1)
    assert any(np.array_equal(page[y : y + 240, 12:312], large) for y in range(len(page) - 240))
    rows, columns = np.nonzero((page == (58, 58, 62)).all(2))  # only in the heatmap
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1, len(rows)) == (240, 90, 240 * 90)


def test_a_sheet_shows_the_pictures_row_by_row():
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    tiles = [Tile(np.full((20, 40, 3), colour, np.uint8), ("a", "b")) for colour in colours]
    page = drawing.sheet(tiles, columns=2, width=100)
    places = []
    for colour in colours:
        rows, columns = np.nonzero((page == colour).all(2))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (40, 80)  # enlarged by a whole factor: 2
        places.append((rows.min(), columns.min()))
    (y0, x0), (y1, x1), (y2, x2) = places
    assert y0 == y1 < y2
    assert x0 == x2 < x1
    assert page.shape[1] == 16 + 2 * 116


def test_a_sheet_scales_the_box_with_its_picture():
    box = (10, 20, 50, 60)
    black = np.zeros((80, 80, 3), np.uint8)
    for width, factor in ((240, 3), (40, 0.5)):
        page = drawing.sheet([Tile(black, box=box)], width=width)
        without_box = drawing.sheet([Tile(black)], width=width)
        rows, columns = np.nonzero((page != without_box).any(2))
        left, top = 16, 16
        drawn_box = columns.min() - left, rows.min() - top, columns.max() + 1 - left, rows.max() + 1 - top
        assert drawn_box == tuple(edge * factor for edge in box)


def test_the_marks_of_right_and_wrong_predictions_differ_in_shape():
    image = picture(20, 20)
    right, wrong, neither = (drawing.sheet([Tile(image, ("cat",), right)]) for right in (True, False, None))
    assert right.shape == wrong.shape == neither.shape
    changed = [(page.astype(int) - neither).any(2) for page in (right, wrong)]
    assert (changed[0] != changed[1]).any()
