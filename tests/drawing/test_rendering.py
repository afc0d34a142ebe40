"""Heatmaps carried to the pixels of the source, against a loop over every pixel."""

import itertools
import sys
import tracemalloc

import numpy as np
import pytest

from visionattn.data.placement import Placement, Preprocess
from visionattn.drawing.overlay import blend, contour
from visionattn.drawing.rendering import Style, peak, render
from visionattn.errors import UsageError

ROOM = sys.modules["visionattn.drawing.rendering"]

SIZES = [(40, 64), (64, 40), (31, 47), (47, 31), (32, 32), (9, 80), (1, 7), (7, 1), (1, 1)]
FITS = ["crop", "letterbox", "stretch", "crop 0.875"]


def placed(size, fit, input_size=(32, 32)):
    """A picture, and where a preparation puts it; the picture is grey, so that all colour comes from the heat."""
    fit, _, fraction = fit.partition(" ")
    picture = np.full((*size, 3), 90, np.uint8)
    _, placement = Preprocess(input_size, fit=fit, crop_fraction=float(fraction or 1))(picture)
    return picture, placement


def placement_by_hand(size, fit, input_size):
    """(scale, shift) along rows and along columns, from what crop, letterbox and stretch mean."""
    fit, _, fraction = fit.partition(" ")
    ratios = [want / have for want, have in zip(input_size, size, strict=True)]
    scale = {"crop": max(ratios) / float(fraction or 1), "letterbox": min(ratios)}.get(fit)
    out = []
    for have, want, ratio in zip(size, input_size, ratios, strict=True):
        scaled = want if scale is None else max(1, round(have * scale))
        assert abs(scaled / have - (scale or ratio)) <= 1 / have  # whole pixels
        out.append((scaled / have, -((scaled - want) // 2)))
    return out


def walk(heatmap, size, fit, input_size):
    """Every pixel's centre, carried to the input, and interpolated between the centres of the cells; NaN: not seen."""
    weights = []
    for have, want, cells, (scale, shift) in zip(
        size, input_size, heatmap.shape, placement_by_hand(size, fit, input_size), strict=True
    ):
        weights.append(np.full((have, cells), np.nan))
        for pixel in range(have):
            place = scale * (pixel + 0.5) + shift
            if 0 <= place <= want:
                place = min(max(place * cells / want - 0.5, 0), cells - 1)
                weights[-1][pixel] = [max(0, 1 - abs(place - cell)) for cell in range(cells)]
    return np.einsum("yr,xc,rc->yx", *weights, heatmap)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("input_size", [(32, 32), (24, 36)])
def test_every_pixel_of_the_source_has_the_heat_of_a_slow_loop(size, fit, input_size):
    picture, placement = placed(size, fit, input_size)
    heatmap = np.random.default_rng(0).random((4, 5)).astype(np.float32)
    expected = walk(heatmap, size, fit, input_size)
    seen = ~np.isnan(expected)
    style = Style(saturation=1.0)
    drawn = blend(picture, np.nan_to_num(expected), saturation=1.0, seen_HW=seen)
    difference = np.abs(render(picture, heatmap, placement, style).astype(int) - drawn)
    assert difference.max() <= 4  # one level of heat
    assert (difference > 0).mean() < 0.05


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 20])
def test_the_peak_lies_on_the_hottest_pixels(size, fit):
    picture, placement = placed(size, fit)
    (scale_y, shift_y), (scale_x, shift_x) = placement_by_hand(size, fit, (32, 32))
    hits = 0
    for row, column in itertools.product((0, 1, 4, 7), repeat=2):
        heatmap = np.zeros((8, 8), np.float32)
        heatmap[row, column] = 1
        x, y = (4 * (column + 0.5) - shift_x) / scale_x, (4 * (row + 0.5) - shift_y) / scale_y  # the cell's centre
        if not (0 <= x <= size[1] and 0 <= y <= size[0]):
            continue  # in the padding; below
        hits += 1
        np.testing.assert_allclose(peak(heatmap, placement), (x, y), atol=1e-9)
        expected = np.nan_to_num(walk(heatmap, size, fit, (32, 32)))
        red = render(picture, heatmap, placement, Style(saturation=1.0))[..., 0]
        for hot in (expected > expected.max() - 1e-6, red == red.max()):
            ys, xs = np.nonzero(hot)
            assert np.maximum(abs(ys + 0.5 - y), abs(xs + 0.5 - x)).min() <= 1  # a pixel's centre beside it
    assert hits >= 8


def test_a_peak_in_the_padding_becomes_the_hottest_place_of_the_source():
    _, placement = placed((16, 32), "letterbox")  # rows 8 to 24 of the input
    heatmap = np.zeros((8, 8), np.float32)
    heatmap[0, 1] = 1.0
    heatmap[4, 6] = 0.4
    x, y = peak(heatmap, placement)
    expected = np.nan_to_num(walk(heatmap, (16, 32), "letterbox", (32, 32)))
    assert expected[int(y), int(x)] == expected.max()


def test_a_constant_heatmap_has_no_peak():
    assert peak(np.zeros((4, 4)), Placement.identity((8, 8))) is None
    assert peak(np.full((4, 4), 0.7), Placement.identity((8, 8))) is None


def test_the_peak_is_at_the_constructed_point():
    heatmap = np.zeros((7, 7), np.float32)
    heatmap[2, 5] = 1
    assert peak(heatmap, Placement.identity((70, 140))) == (110.0, 25.0)


@pytest.mark.parametrize("fit", FITS)
def test_bands_show_no_seam(fit, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (53, 37, 3), dtype=np.uint8)
    _, placement = placed((53, 37), fit)
    heatmap = np.random.default_rng(1).random((6, 6)).astype(np.float32)
    style = Style(contours=(0.5,))
    monkeypatch.setattr(ROOM, "_BAND", 1 << 30)
    whole = render(picture, heatmap, placement, style)
    seen = placement.seen()
    at_once = contour(blend(picture, placement.carry(heatmap), seen_HW=seen), placement.carry(heatmap), levels=(0.5,))
    np.testing.assert_array_equal(whole, at_once)
    for band in (1, 37, 100, 37 * 52):
        monkeypatch.setattr(ROOM, "_BAND", band)
        difference = np.abs(render(picture, heatmap, placement, style).astype(int) - whole)
        assert difference.max() <= 4  # float32 sums in another order: one level of heat
        assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("angle", [0, 17, 90, 180])
def test_rotated_placements_are_rendered_correctly(angle):
    cos, sin = np.cos(np.radians(angle)), np.sin(np.radians(angle))
    matrix = np.array([[cos, -sin, 16 - 20 * cos + 15 * sin], [sin, cos, 16 - 20 * sin - 15 * cos]])
    placement = Placement(matrix, (30, 40), (32, 32))
    heatmap = np.zeros((8, 8), np.float32)
    heatmap[1, 6] = 1
    out = render(np.full((30, 40, 3), 90, np.uint8), heatmap, placement, Style())
    for y, x in itertools.product(range(30), range(40)):
        u, v = matrix @ (x + 0.5, y + 0.5, 1)
        if not (-1e-6 <= u <= 32 + 1e-6 and -1e-6 <= v <= 32 + 1e-6):
            assert tuple(out[y, x]) == (31, 31, 31) or min(abs(u), abs(v), abs(u - 32), abs(v - 32)) < 1e-6
    x, y = peak(heatmap, placement)
    np.testing.assert_allclose(matrix @ (x, y, 1), (26, 6), atol=1e-9)


def test_a_large_picture_takes_little_memory_beyond_itself():
    picture = np.zeros((6000, 4000, 3), np.uint8)
    placement = Placement.scaling((6000, 4000), (224, 224))
    tracemalloc.start()
    render(picture, np.random.default_rng(0).random((14, 14)).astype(np.float32), placement, Style())
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 1.5 * picture.nbytes  # the overlay itself, and less than half as much again


def test_the_picture_is_not_changed_and_one_of_another_size_is_refused():
    picture, placement = placed((40, 64), "crop")
    before = picture.copy()
    render(picture, np.ones((4, 4), np.float32), placement, Style(contours=(0.5,)))
    np.testing.assert_array_equal(picture, before)
    with pytest.raises(UsageError, match="the picture is 64 × 40, but the placement is of one of"):
        render(picture.transpose(1, 0, 2), np.ones((4, 4)), placement, Style())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colormap": "infernal"}, r"no colormap 'infernal'.*Nearest: inferno\."),
        ({"alpha": 2}, r"alpha and saturation must be in \[0, 1\]"),
        ({"contours": (0.0,)}, r"contours in \(0, 1\]"),
        ({"suffix": ".gif"}, r"written as \.jpg, \.png or \.webp, not '\.gif'"),
    ],
)
def test_an_invalid_style_is_refused_when_it_is_made(options, words):
    with pytest.raises(UsageError, match=words):
        Style(**options)
