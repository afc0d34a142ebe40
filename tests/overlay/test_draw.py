"""Drawing against slow loops from the docstrings' equations, and pixel by pixel where lines must be."""

import itertools

import cv2
import numpy as np
import pytest

from visionattn.errors import UsageError
from visionattn.overlay import draw
from visionattn.overlay.draw import Tile

GREY = np.array([0.299, 0.587, 0.114])


def picture(height=9, width=13, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ramp(height=9, width=13):
    """A heatmap at exactly 256 levels, so that nothing is lost by counting in levels."""
    levels = np.random.default_rng(1).integers(0, 256, (height, width))
    levels.flat[0], levels.flat[-1] = 0, 255
    return (levels / 255).astype(np.float32)


def colour_of(level, colormap):
    return cv2.applyColorMap(np.full((1, 1), level, np.uint8), draw.COLORMAPS[colormap])[0, 0, ::-1].astype(float)


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
def test_blend_is_its_equation(shape, options):
    image, heatmap = picture(*shape), ramp(*shape)
    difference = draw.blend(image, heatmap, **options) - blend_by_the_equation(image, heatmap, **options)
    assert np.abs(difference).max() < 2
    assert (np.abs(difference) >= 1.5).mean() <= 1e-3
    assert abs(difference.mean()) < 0.1 or difference.size < 1000  # it neither brightens nor darkens


def test_blend_is_the_same_in_bands_as_in_pieces():
    image, heatmap = picture(50, 3000), ramp(50, 3000)  # several bands
    whole = draw.blend(image, heatmap)
    pieces = [draw.blend(image[row : row + 1], heatmap[row : row + 1]) for row in range(50)]
    np.testing.assert_array_equal(whole, np.concatenate(pieces))


def test_a_cold_heatmap_with_full_saturation_leaves_the_picture_as_it_is():
    image = picture()
    np.testing.assert_array_equal(draw.blend(image, np.zeros((9, 13)), saturation=1.0), image)
    np.testing.assert_array_equal(draw.blend(image, ramp(), saturation=1.0, alpha=0.0), image)


def test_values_beyond_the_range_count_as_its_ends():
    image = picture(1, 2)
    beyond, ends = np.float32([[-0.5, 7.0]]), np.float32([[0.0, 1.0]])
    np.testing.assert_array_equal(draw.blend(image, beyond), draw.blend(image, ends))


def test_what_the_model_never_saw_is_grey_and_dark_and_the_rest_is_untouched():
    image, heatmap = picture(20, 30), ramp(20, 30)
    seen = np.zeros((20, 30), bool)
    seen[3:15, 4:21] = True
    out = draw.blend(image, heatmap, seen_HW=seen)
    np.testing.assert_array_equal(out[seen], draw.blend(image, heatmap)[seen])
    unseen = out[~seen].astype(float)
    assert np.ptp(unseen, axis=1).max() == 0  # grey
    expected = 0.35 * (image[~seen] @ GREY)
    assert np.abs(unseen[:, 0] - expected).max() <= 1
    np.testing.assert_array_equal(
        draw.blend(image, heatmap, seen_HW=np.ones((20, 30), bool)), draw.blend(image, heatmap)
    )


def test_heat_has_the_colours_of_the_colormap():
    heatmap = np.arange(256, dtype=np.float32)[None] / 255
    for name in draw.COLORMAPS:
        drawn = draw.heat(heatmap, colormap=name)[0]
        for level in (0, 1, 100, 254, 255):
            assert tuple(drawn[level]) == tuple(colour_of(level, name))
        assert len(np.unique(drawn, axis=0)) > 200


DRAWERS = {
    "blend": draw.blend,
    "contour": draw.contour,
    "top_mask": draw.top_mask,
    "side_by_side": draw.side_by_side,
    "seen": lambda image, heatmap: draw.blend(image, heatmap, seen_HW=heatmap > 0.5),
    "draw_box": lambda image, heatmap: draw.draw_box(image, (1, 1, 7, 6)),
    "boxes": lambda image, heatmap: draw.boxes(image, [(1, 1, 7, 6)], labels=["cat"]),
    "sheet": lambda image, heatmap: draw.sheet([Tile(image, ("cat",), True, (1, 1, 7, 6))]),
}


@pytest.mark.parametrize("name", DRAWERS)
@pytest.mark.parametrize("view", ["plain", "turned", "mirrored", "every_other", "read_only", "column_major"])
def test_inputs_stay_as_they_are_however_they_lie_in_memory(name, view):
    image, heatmap = picture(26, 18), ramp(26, 18)
    image, heatmap = (
        {
            "plain": lambda a: a,
            "turned": lambda a: np.rot90(a),
            "mirrored": lambda a: a[:, ::-1],
            "every_other": lambda a: a[::2, ::2],
            "read_only": lambda a: a,
            "column_major": np.asfortranarray,
        }[view](image),
        {"turned": np.rot90, "mirrored": np.fliplr, "every_other": lambda a: a[::2, ::2]}.get(view, np.array)(heatmap),
    )
    if view == "read_only":
        image.flags.writeable = heatmap.flags.writeable = False
    before = image.copy(), heatmap.copy()
    out = DRAWERS[name](image, heatmap)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(heatmap, before[1])
    assert out.dtype == np.uint8
    assert not np.shares_memory(out, image)
    np.testing.assert_array_equal(out, DRAWERS[name](*map(np.ascontiguousarray, before)))
    if name not in ("side_by_side", "sheet"):
        assert out.shape == image.shape


def test_a_contour_runs_where_the_heatmap_passes_the_level_and_nowhere_else():
    image = np.full((80, 100, 3), 100, np.uint8)
    heatmap = np.zeros((80, 100), np.float32)
    heatmap[20:60, 30:70] = 0.8
    out = draw.contour(image, heatmap, levels=(0.5,), thickness=1)
    for line in (out[20, 30:70], out[59, 30:70], out[20:60, 30], out[20:60, 69]):
        assert line.min() > 200  # smoothed, and so not quite white
    changed = (out != image).any(2)
    near = np.zeros((80, 100), bool)
    near[16:64, 26:74] = True
    near[24:56, 34:66] = False
    assert changed[~near].sum() == 0
    np.testing.assert_array_equal(draw.contour(image, heatmap, levels=(0.9,)), image)


def test_top_is_the_share_that_a_full_sort_gives():
    heatmap = np.random.default_rng(0).permutation(400).reshape(20, 20) / 400
    for share in (0.001, 0.2, 0.5, 0.999, 1.0):
        expected = set(np.argsort(heatmap.ravel())[::-1][: max(1, round(share * 400))])
        expected.discard(int(heatmap.argmin()))  # the coldest of all is never hot
        assert set(np.flatnonzero(draw.top(heatmap, share))) == expected
    assert not draw.top(np.full((4, 4), 0.3), 0.5).any()


def test_top_mask_keeps_the_hottest_and_darkens_the_others():
    image, heatmap = picture(20, 20), np.arange(400).reshape(20, 20) / 399
    out = draw.top_mask(image, heatmap, share=0.25)
    np.testing.assert_array_equal(out[15:], image[15:])
    assert np.abs(out[:15, :, 0] - 0.35 * (image[:15] @ GREY)).max() <= 1


def test_a_box_lies_on_the_pixels_inside_its_edges():
    image = np.full((40, 50, 3), 7, np.uint8)
    out = draw.draw_box(image, (10, 5, 30, 25), colour=(255, 0, 9), thickness=2)
    ring = np.zeros((40, 50), int)
    ring[5:25, 10:30] = 1  # the box covers [10, 30) × [5, 25)
    ring[7:23, 12:28] = 2  # a dark rim, one pixel
    ring[8:22, 13:27] = 0
    np.testing.assert_array_equal(out, np.array([(7, 7, 7), (255, 0, 9), (0, 0, 0)])[ring])


@pytest.mark.parametrize("box", [(-9, -9, 500, 500), (48, 38, 90, 90), (20, 20, 21, 21), (5, 5, 5, 5), (9, 9, 3, 3)])
def test_a_box_beyond_the_picture_or_without_area_is_no_error(box):
    image = np.zeros((40, 50, 3), np.uint8)
    changed = draw.draw_box(image, box, colour=(9, 9, 9)).any(2)
    inside = np.zeros((40, 50), bool)
    inside[max(0, box[1]) : max(0, box[3]), max(0, box[0]) : max(0, box[2])] = True
    assert not changed[~inside].any()


def test_labels_stand_above_their_box_or_inside_where_there_is_no_room():
    image = np.zeros((200, 300, 3), np.uint8)
    colour = (0, 255, 0)
    high = draw.boxes(image, [(40, 60, 200, 150)], labels=["cat"], colours=[colour])
    assert tuple(high[59, 41]) == colour
    assert tuple(high[62, 150]) != colour
    low = draw.boxes(image, [(40, 2, 200, 150)], labels=["cat"], colours=[colour])
    assert tuple(low[6, 41]) == colour
    unlabelled = draw.boxes(image, [(40, 60, 200, 150)], colours=[colour])
    np.testing.assert_array_equal(unlabelled, draw.draw_box(image, (40, 60, 200, 150), colour=colour))
    np.testing.assert_array_equal(draw.boxes(image, []), image)


@pytest.mark.parametrize("height", [1, 10, 300])
def test_a_colour_bar_runs_from_one_at_the_top_to_zero(height):
    bar = draw.colour_bar(height, width=12)
    assert len(bar) == height
    np.testing.assert_array_equal(bar[0, :12], np.tile(colour_of(255, "inferno"), (12, 1)))
    if height > 1:
        np.testing.assert_array_equal(bar[-1, :12], np.tile(colour_of(0, "inferno"), (12, 1)))


def test_side_by_side_holds_the_picture_its_overlay_and_the_heat():
    image, heatmap = picture(240, 260), ramp(240, 260)
    page = draw.side_by_side(image, heatmap)
    for panel in (image, draw.blend(image, heatmap), draw.heat(heatmap)):
        hits = [x for x in range(page.shape[1] - 260) if np.array_equal(page[12:252, x : x + 260], panel)]
        assert len(hits) == 1


def test_side_by_side_enlarges_small_pictures_and_marks_what_was_not_seen():
    image, heatmap = picture(8, 10), ramp(8, 10)
    seen = np.ones((8, 10), bool)
    seen[:, 7:] = False
    page = draw.side_by_side(image, heatmap, seen_HW=seen, title="cat 98 %")
    large = image.repeat(30, 0).repeat(30, 1)
    assert any(np.array_equal(page[y : y + 240, 12:312], large) for y in range(len(page) - 240))
    rows, columns = np.nonzero((page == (58, 58, 62)).all(2))  # in the heatmap alone
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1, len(rows)) == (240, 90, 240 * 90)


def test_a_sheet_holds_every_picture_at_its_place():
    colours = [(200, 10, 10), (10, 200, 10), (10, 10, 200)]
    tiles = [Tile(np.full((20, 40, 3), colour, np.uint8), ("a", "b")) for colour in colours]
    page = draw.sheet(tiles, columns=2, width=100)
    places = []
    for colour in colours:
        rows, columns = np.nonzero((page == colour).all(2))
        assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (40, 80)  # by whole numbers: twice the size
        places.append((rows.min(), columns.min()))
    (y0, x0), (y1, x1), (y2, x2) = places
    assert y0 == y1 < y2
    assert x0 == x2 < x1
    assert page.shape[1] == 16 + 2 * 116


def test_a_sheet_scales_the_box_with_its_picture():
    box = (10, 20, 50, 60)
    black = np.zeros((80, 80, 3), np.uint8)
    for width, factor in ((240, 3), (40, 0.5)):
        page = draw.sheet([Tile(black, box=box)], width=width)
        plain = draw.sheet([Tile(black)], width=width)
        rows, columns = np.nonzero((page != plain).any(2))
        left, top = 16, 16
        found = columns.min() - left, rows.min() - top, columns.max() + 1 - left, rows.max() + 1 - top
        assert found == tuple(edge * factor for edge in box)


def test_right_and_wrong_are_told_by_shape():
    tile = picture(20, 20)
    right, wrong, neither = (draw.sheet([Tile(tile, ("cat",), right)]) for right in (True, False, None))
    assert right.shape == wrong.shape == neither.shape
    marks = [(page.astype(int) - neither).any(2) for page in (right, wrong)]
    assert (marks[0] != marks[1]).any()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: draw.blend(picture(), np.zeros((9, 12))), "carry the heatmap"),
        (lambda: draw.blend(picture().astype(float), ramp()), "uint8 RGB"),
        (lambda: draw.blend(picture()[..., 0], ramp()), "uint8 RGB"),
        (lambda: draw.blend(picture(), ramp(), alpha=1.5), r"alpha must be in \[0, 1\], got 1.5"),
        (lambda: draw.blend(picture(), ramp(), saturation=-1), "saturation must be"),
        (lambda: draw.blend(picture(), ramp(), colormap="virdis"), "Nearest: viridis"),
        (lambda: draw.contour(picture(), np.zeros((2, 2))), "carry the heatmap"),
        (lambda: draw.top_mask(picture(), ramp(), share=0), r"in \(0, 1\], got 0"),
        (lambda: draw.boxes(picture(), [(0, 0, 3, 3)], labels=["a", "b"]), "2 labels for 1 boxes"),
        (lambda: draw.sheet([]), "at least one picture"),
        (lambda: draw.sheet([Tile(picture())], columns=0), "one column"),
        (lambda: draw.side_by_side(picture(), np.zeros((2, 2))), "carry the heatmap"),
    ],
)
def test_errors_are_one_sentence_that_names_what_was_wrong(call, words):
    with pytest.raises(UsageError, match=words) as caught:
        call()
    assert "\n" not in str(caught.value)
