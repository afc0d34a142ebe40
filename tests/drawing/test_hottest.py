"""The hottest pixels of a heatmap are the first pixels of a full sort."""

import numpy as np

from tests.drawing.pictures import picture
from visionattn import drawing

GREY = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue


def test_top_matches_a_full_sort():
    heatmap = np.random.default_rng(0).permutation(400).reshape(20, 20) / 400
    for fraction in (0.001, 0.2, 0.5, 0.999, 1.0):
        expected = set(np.argsort(heatmap.ravel())[::-1][: max(1, round(fraction * 400))])
        expected.discard(int(heatmap.argmin()))  # pixels with the minimum value are never selected
        assert set(np.flatnonzero(drawing.top(heatmap, fraction))) == expected
    assert not drawing.top(np.full((4, 4), 0.3), 0.5).any()


def test_show_hottest_keeps_the_hottest_pixels_and_darkens_the_others():
    image, heatmap = picture(20, 20), np.arange(400).reshape(20, 20) / 399
    out = drawing.show_hottest(image, heatmap, fraction=0.25)
    np.testing.assert_array_equal(out[15:], image[15:])
    assert np.abs(out[:15, :, 0] - 0.35 * (image[:15] @ GREY)).max() <= 1
