"""Heatmaps over pictures, against slow loops from the equations in the docstrings."""

import itertools

import numpy as np
import pytest

from tests.drawing.pictures import colour_of, picture, ramp
from visionattn import drawing

GREY = np.array([0.299, 0.587, 0.114])


def blend_by_the_equation(image, heatmap, *, colormap="inferno", alpha=0.75, saturation=0.45):
    out = np.empty(image.shape)
    for row, column in itertools.product(*map(range, heatmap.shape)):
        pixel, hot = image[row, column].astype(float), float(heatmap[row, column])
        base = saturation * pixel + (1 - saturation) * (GREY @ pixel)
        opacity = alpha * hot**0.5
        out[row, column] = (1 - opacity) * base + opacity * colour_of(round(hot * 255), colormap)
    return out


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (4, 1), (3, 40), (40, 3), (37, 31)])
@pytest.mark.parametrize("options", [{}, {"colormap": "viridis", "alpha": 0.3, "saturation": 1.0}, {"alpha": 1.0}])
def test_blend_matches_its_equation(shape, options):
    image, heatmap = picture(*shape), ramp(*shape)
    difference = drawing.blend(image, heatmap, **options) - blend_by_the_equation(image, heatmap, **options)
    assert np.abs(difference).max() < 2
    assert (np.abs(difference) >= 1.5).mean() <= 1e-3
    assert abs(difference.mean()) < 0.1 or difference.size < 1000  # it neither brightens nor darkens


def test_blend_does_not_depend_on_bands():
    image, heatmap = picture(50, 3000), ramp(50, 3000)  # several bands
    whole = drawing.blend(image, heatmap)
    pieces = [drawing.blend(image[row : row + 1], heatmap[row : row + 1]) for row in range(50)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_a_cold_heatmap_with_full_saturation_leaves_the_picture_as_it_is():
    image = picture()
    np.testing.assert_array_equal(drawing.blend(image, np.zeros((9, 13)), saturation=1.0), image)
    np.testing.assert_array_equal(drawing.blend(image, ramp(), saturation=1.0, alpha=0.0), image)


def test_heat_beyond_the_range_is_clipped():
    image = picture(1, 2)
    beyond, ends = np.float32([[-0.5, 7.0]]), np.float32([[0.0, 1.0]])
    np.testing.assert_array_equal(drawing.blend(image, beyond), drawing.blend(image, ends))


def test_unseen_pixels_are_grey_and_dark_and_the_others_are_unchanged():
    image, heatmap = picture(20, 30), ramp(20, 30)
    seen = np.zeros((20, 30), bool)
    seen[3:15, 4:21] = True
    out = drawing.blend(image, heatmap, seen_HW=seen)
    np.testing.assert_array_equal(out[seen], drawing.blend(image, heatmap)[seen])
    unseen = out[~seen].astype(float)
    assert np.ptp(unseen, axis=1).max() == 0  # grey
    expected = 0.35 * (image[~seen] @ GREY)
    assert np.abs(unseen[:, 0] - expected).max() <= 1
    np.testing.assert_array_equal(
        drawing.blend(image, heatmap, seen_HW=np.ones((20, 30), bool)), drawing.blend(image, heatmap)
    )


def test_heat_has_the_colours_of_the_colormap():
    heatmap = np.arange(256, dtype=np.float32)[None] / 255
    for name in drawing.COLORMAPS:
        drawn = drawing.heat(heatmap, colormap=name)[0]
        for level in (0, 1, 100, 254, 255):
            assert tuple(drawn[level]) == tuple(colour_of(level, name))
        assert len(np.unique(drawn, axis=0)) > 200


def test_a_contour_runs_where_the_heatmap_passes_the_level_and_nowhere_else():
    image = np.full((80, 100, 3), 100, np.uint8)
    heatmap = np.zeros((80, 100), np.float32)
    heatmap[20:60, 30:70] = 0.8
    out = drawing.contour(image, heatmap, levels=(0.5,), thickness=1)
    for line in (out[20, 30:70], out[59, 30:70], out[20:60, 30], out[20:60, 69]):
        assert line.min() > 200  # smoothed, and so not quite white
    changed = (out != image).any(2)
    near = np.zeros((80, 100), bool)
    near[16:64, 26:74] = True
    near[24:56, 34:66] = False
    assert changed[~near].sum() == 0
    np.testing.assert_array_equal(drawing.contour(image, heatmap, levels=(0.9,)), image)


def test_top_matches_a_full_sort():
    heatmap = np.random.default_rng(0).permutation(400).reshape(20, 20) / 400
    for fraction in (0.001, 0.2, 0.5, 0.999, 1.0):
        expected = set(np.argsort(heatmap.ravel())[::-1][: max(1, round(fraction * 400))])
        expected.discard(int(heatmap.argmin()))  # the coldest of all is never hot
        assert set(np.flatnonzero(drawing.top(heatmap, fraction))) == expected
    assert not drawing.top(np.full((4, 4), 0.3), 0.5).any()


def test_top_mask_keeps_the_hottest_and_darkens_the_others():
    image, heatmap = picture(20, 20), np.arange(400).reshape(20, 20) / 399
    out = drawing.show_hottest(image, heatmap, fraction=0.25)
    np.testing.assert_array_equal(out[15:], image[15:])
    assert np.abs(out[:15, :, 0] - 0.35 * (image[:15] @ GREY)).max() <= 1
