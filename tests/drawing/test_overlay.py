"""Heatmaps over pictures match slow loops that follow the equations in the docstrings."""

import itertools
import tracemalloc

import numpy as np
import pytest

from tests.drawing.pictures import colour_of, picture, ramp
from visionattn import drawing
from visionattn.data.placement import Placement, Preprocess
from visionattn.drawing.overlay import Style, blend, contour, peak, render
from visionattn.errors import UsageError

GREY = np.array([0.299, 0.587, 0.114])  # weights of red, green and blue
SIZES = [(40, 64), (64, 40), (31, 47), (47, 31), (32, 32), (9, 80), (1, 7), (7, 1), (1, 1)]
INTERPOLATIONS = ("nearest", "linear", "smooth")
FITS = ["crop", "letterbox", "stretch", "crop 0.875"]


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
    assert abs(difference.mean()) < 0.1 or difference.size < 1000  # no bias towards bright or dark


def test_blend_does_not_depend_on_bands():
    image, heatmap = picture(50, 3000), ramp(50, 3000)  # several bands
    whole = drawing.blend(image, heatmap)
    single_rows = [drawing.blend(image[row : row + 1], heatmap[row : row + 1]) for row in range(50)]
    np.testing.assert_array_equal(whole, np.concatenate(single_rows))


def test_zero_heat_or_zero_alpha_with_full_saturation_leaves_the_picture_unchanged():
    image = picture()
    np.testing.assert_array_equal(drawing.blend(image, np.zeros((9, 13)), saturation=1.0), image)
    np.testing.assert_array_equal(drawing.blend(image, ramp(), saturation=1.0, alpha=0.0), image)


def test_heat_beyond_the_range_is_clipped():
    image = picture(1, 2)
    beyond, ends = np.float32([[-0.5, 7.0]]), np.float32([[0.0, 1.0]])
    np.testing.assert_array_equal(drawing.blend(image, beyond), drawing.blend(image, ends))


def test_pixels_outside_the_input_are_dark_and_grey_and_the_others_are_blended():
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


def test_a_contour_is_drawn_only_where_the_heatmap_crosses_the_level():
    image = np.full((80, 100, 3), 100, np.uint8)
    heatmap = np.zeros((80, 100), np.float32)
    heatmap[20:60, 30:70] = 0.8
    out = drawing.contour(image, heatmap, levels=(0.5,), thickness=1)
    for line in (out[20, 30:70], out[59, 30:70], out[20:60, 30], out[20:60, 69]):
        assert line.min() > 200  # antialiased, so not quite white
    changed = (out != image).any(2)
    near_line = np.zeros((80, 100), bool)
    near_line[16:64, 26:74] = True
    near_line[24:56, 34:66] = False
    assert changed[~near_line].sum() == 0
    np.testing.assert_array_equal(drawing.contour(image, heatmap, levels=(0.9,)), image)


def placed(size, fit, input_size=(32, 32)):
    """A picture and its placement. The picture is grey, so that all colour in overlays comes from the heatmap."""
    fit, _, fraction = fit.partition(" ")
    picture = np.full((*size, 3), 90, np.uint8)
    _, placement = Preprocess(input_size, fit=fit, crop_fraction=float(fraction or 1))(picture)
    return picture, placement


def placement_by_hand(size, fit, input_size):
    """(scale, shift) of the rows and of the columns, by the definitions of crop, letterbox and stretch."""
    fit, _, fraction = fit.partition(" ")
    frame = [int(want / float(fraction or 1)) for want in input_size]
    ratios = [side / have for side, have in zip(frame, size, strict=True)]
    scale = {"crop": max(ratios), "letterbox": min(ratios)}.get(fit)
    out = []
    for have, want, side, ratio in zip(size, input_size, frame, ratios, strict=True):
        scaled = side if scale is None else max(1, round(have * scale))
        if fit == "crop" and frame[0] == frame[1]:  # torchvision rounds the longer side down
            scaled = side * have // min(size)
        assert abs(scaled / have - (scale or ratio)) <= 1 / have  # the scaled size is rounded to whole pixels
        rest = scaled - want
        out.append((scaled / have, -round(rest / 2) if rest >= 0 else -rest // 2))
    return out


def heat_by_loop(heatmap, size, fit, input_size):
    """The heat of every source pixel, interpolated between the centres of the cells; NaN outside the input."""
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
def test_render_matches_a_slow_loop_over_the_pixels_of_the_source(size, fit, input_size):
    picture, placement = placed(size, fit, input_size)
    heatmap = np.random.default_rng(0).random((4, 5)).astype(np.float32)
    expected = heat_by_loop(heatmap, size, fit, input_size)
    seen = ~np.isnan(expected)
    style = Style(saturation=1.0, interpolation="linear")
    drawn = blend(picture, np.nan_to_num(expected), saturation=1.0, seen_HW=seen)
    difference = np.abs(render(picture, heatmap, placement, style).astype(int) - drawn)
    assert difference.max() <= 4  # the heat may be rounded to the next of 256 levels
    assert (difference > 0).mean() < 0.05


@pytest.mark.parametrize("interpolation", ["linear", "smooth"])
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [size for size in SIZES if min(size) > 20])
def test_the_peak_is_the_centre_of_the_hottest_cell_and_lies_on_the_hottest_pixels(size, fit, interpolation):
    picture, placement = placed(size, fit)
    (scale_y, shift_y), (scale_x, shift_x) = placement_by_hand(size, fit, (32, 32))
    tested = 0
    for row, column in itertools.product((0, 1, 4, 7), repeat=2):
        heatmap = np.zeros((8, 8), np.float32)
        heatmap[row, column] = 1
        x, y = (4 * (column + 0.5) - shift_x) / scale_x, (4 * (row + 0.5) - shift_y) / scale_y  # the cell's centre
        if not (0 <= x <= size[1] and 0 <= y <= size[0]):
            continue  # a cell in the padding; see the next test
        tested += 1
        np.testing.assert_allclose(peak(heatmap, placement), (x, y), atol=1e-9)
        expected = np.nan_to_num(heat_by_loop(heatmap, size, fit, (32, 32)))
        style = Style(saturation=1.0, interpolation=interpolation)
        red = render(picture, heatmap, placement, style)[..., 0]
        half_cell = (2 / scale_y, 2 / scale_x) if interpolation == "smooth" else (1, 1)
        for hot, (near_y, near_x) in ((expected > expected.max() - 1e-6, (1, 1)), (red == red.max(), half_cell)):
            ys, xs = np.nonzero(hot)  # within a pixel of the peak; smooth heat at an edge, within the peak's cell
            assert ((abs(ys + 0.5 - y) <= max(1, near_y)) & (abs(xs + 0.5 - x) <= max(1, near_x))).any()
    assert tested >= 8


def test_a_peak_in_the_padding_is_replaced_by_the_hottest_pixel_of_the_source():
    _, placement = placed((16, 32), "letterbox")  # the source covers rows 8 to 24 of the input
    heatmap = np.zeros((8, 8), np.float32)
    heatmap[0, 1] = 1.0
    heatmap[4, 6] = 0.4
    x, y = peak(heatmap, placement)
    expected = np.nan_to_num(heat_by_loop(heatmap, (16, 32), "letterbox", (32, 32)))
    assert expected[int(y), int(x)] == expected.max()


def test_a_constant_heatmap_has_no_peak():
    assert peak(np.zeros((4, 4)), Placement.identity((8, 8))) is None
    assert peak(np.full((4, 4), 0.7), Placement.identity((8, 8))) is None


def test_the_peak_is_the_centre_of_the_hottest_cell():
    heatmap = np.zeros((7, 7), np.float32)
    heatmap[2, 5] = 1
    assert peak(heatmap, Placement.identity((70, 140))) == (110.0, 25.0)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("fit", FITS)
def test_drawing_in_bands_gives_the_same_picture_as_drawing_at_once(fit, interpolation, monkeypatch):
    picture = np.random.default_rng(0).integers(0, 256, (53, 37, 3), dtype=np.uint8)
    _, placement = placed((53, 37), fit)
    heatmap = np.random.default_rng(1).random((6, 6)).astype(np.float32)
    style = Style(contours=(0.5,), interpolation=interpolation)
    monkeypatch.setattr("visionattn.drawing.overlay._BAND", 1 << 30)
    whole = render(picture, heatmap, placement, style)
    seen = placement.seen()
    carried = placement.carry(heatmap, interpolation)
    expected = contour(blend(picture, carried, seen_HW=seen), carried, levels=(0.5,))
    np.testing.assert_array_equal(whole, expected)
    for band in (1, 37, 100, 37 * 52):
        monkeypatch.setattr("visionattn.drawing.overlay._BAND", band)
        difference = np.abs(render(picture, heatmap, placement, style).astype(int) - whole)
        assert difference.max() <= 4  # float32 sums in another order change the heat by one level
        assert (difference > 0).mean() < 1e-3


@pytest.mark.parametrize("angle", [0, 17, 90, 180])
def test_rotated_placements_are_dark_outside_the_input_and_keep_the_peak(angle):
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


def test_a_large_picture_needs_little_memory_besides_its_overlay():
    picture = np.zeros((6000, 4000, 3), np.uint8)
    placement = Placement.scaling((6000, 4000), (224, 224))
    tracemalloc.start()
    render(picture, np.random.default_rng(0).random((14, 14)).astype(np.float32), placement, Style())
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak_bytes < 1.5 * picture.nbytes  # the overlay and less than half its size


def test_render_does_not_change_the_picture_and_refuses_a_picture_of_another_size():
    picture, placement = placed((40, 64), "crop")
    before = picture.copy()
    render(picture, np.ones((4, 4), np.float32), placement, Style(contours=(0.5,)))
    np.testing.assert_array_equal(picture, before)
    with pytest.raises(UsageError, match="the picture is 64 × 40, but the placement is for"):
        render(picture.transpose(1, 0, 2), np.ones((4, 4)), placement, Style())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"colormap": "infernal"}, r"no colormap 'infernal'.*Nearest: inferno\."),
        ({"alpha": 2}, r"alpha and saturation must be in \[0, 1\]"),
        ({"contours": (0.0,)}, r"contours in \(0, 1\]"),
        ({"interpolation": "cubic"}, "nearest, linear or smooth, not 'cubic'"),
        ({"suffix": ".gif"}, r"written as \.jpg, \.png or \.webp, not '\.gif'"),
    ],
)
def test_an_invalid_style_raises_an_error_when_it_is_created(options, words):
    with pytest.raises(UsageError, match=words):
        Style(**options)
