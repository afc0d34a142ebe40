"""Shrunk pictures match block averages, and enlarged pictures match repeated pixels."""

import numpy as np
import pytest

from visionattn.drawing.resizing import enlarge, shrink


def noise(height, width):
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def test_shrink_averages_pixels():
    picture = noise(12, 24)
    small = shrink(picture, 6)
    assert small.shape == (3, 6, 3)
    for row in range(3):
        for column in range(6):
            block = picture[4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert np.abs(small[row, column] - block.mean((0, 1))).max() <= 0.51  # rounded to whole numbers


@pytest.mark.parametrize(("size", "expected"), [((30, 90), (7, 20)), ((400, 1), (20, 1)), ((20, 5), (20, 5))])
def test_the_longer_side_fits_and_no_side_vanishes(size, expected):
    assert shrink(noise(*size), 20).shape == (*expected, 3)


def test_enlarge_repeats_pixels_as_squares():
    picture = noise(3, 4)
    large = enlarge(picture, 5)
    assert large.shape == (15, 20, 3)
    for row, column in np.ndindex(15, 20):
        assert (large[row, column] == picture[row // 5, column // 5]).all()
