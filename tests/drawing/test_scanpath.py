"""Paths, animations and densities of glimpses have every box at its location in the source."""

import numpy as np
import pytest
import torch

from tests.drawing.glimpses import film
from visionattn.attention import Retina
from visionattn.data import Placement, Preprocess
from visionattn.drawing import draw_fixation_density, draw_scanpath
from visionattn.drawing.overlay import heat
from visionattn.drawing.scanpath import boxes_in_source, centres
from visionattn.errors import UsageError

VIOLET, YELLOW = (121, 2, 168), (243, 239, 36)
"""About the colours of the first and the last glimpse."""


def black(height, width):
    return np.zeros((height, width, 3), np.uint8)


def is_near(pixels, colour, by=25):
    return (np.abs(pixels.astype(int) - colour) <= by).all(-1)


def test_a_box_is_drawn_on_its_edges_in_a_picture_enlarged_by_whole_pixels():
    image = np.random.default_rng(0).integers(0, 60, (28, 28, 3)).astype(np.uint8)
    drawn = draw_scanpath(image, np.array([[[4.0, 5, 12, 13]]]))
    assert drawn.shape == (448, 448, 3)
    violet = is_near(drawn, VIOLET)
    rows, columns = np.flatnonzero(violet.any(1)), np.flatnonzero(violet.any(0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (5 * 16, 13 * 16 - 1, 4 * 16, 12 * 16 - 1)
    outside = np.ones((448, 448), bool)
    outside[80:208, 64:192] = False
    assert (drawn[outside] == image.repeat(16, 0).repeat(16, 1)[outside]).all()


@pytest.mark.parametrize(
    ("shape", "side", "expected"),
    [
        ((28, 28), 240, (224, 224)),
        ((20, 60), None, (140, 420)),
        ((300, 200), None, (300, 200)),
        ((500, 1000), 240, (120, 240)),
        ((3000, 4000), None, (3000, 4000)),
    ],
)
def test_pictures_of_any_size_are_drawn_on(shape, side, expected):
    height, width = shape
    # in the middle, half as wide and high as the picture, and one that reaches out of it
    boxes = np.array([[[width / 4, height / 4, 3 * width / 4, 3 * height / 4], [-9.0, -9, width + 9, height + 9]]])
    drawn = draw_scanpath(black(*shape), boxes, side=side)
    assert drawn.shape[:2] == expected
    columns = np.flatnonzero(is_near(drawn[expected[0] // 2 - expected[0] // 6], VIOLET))
    assert abs(columns[0] - expected[1] / 4) <= 1
    assert abs(columns[-1] + 1 - expected[1] * 3 / 4) <= 1
    assert not drawn[0].any(), "what reaches out of the picture has no edge in it"


def test_the_order_is_shown_by_colours_and_numbers_and_the_first_by_a_ring():
    boxes = np.array([[[x, 10.0, x + 8, 18]] for x in (2, 10, 18)])
    drawn = draw_scanpath(black(28, 28), boxes)
    for (x, y), colour in zip(centres(boxes) * 16, (VIOLET, (205, 74, 118), YELLOW), strict=True):
        disc = drawn[int(y) - 8 : int(y) + 8, int(x) - 8 : int(x) + 8]
        assert 0.5 < is_near(disc, colour, 40).mean() < 0.98, "a disc with a number on it"
    white = is_near(drawn, (236, 236, 236), 20)
    rows, columns = np.mgrid[: len(drawn), : drawn.shape[1]] + 0.5
    shares = []
    for x, y in centres(boxes) * 16:
        away = np.hypot(rows - y, columns - x)
        shares.append(white[(away > 10.8) & (away < 11.6)].mean())
    assert shares[0] > 0.9
    assert shares[1:] == [0, 0]


@pytest.mark.parametrize("corner", [(10, 10), (-4, -4), (24, 10)])
def test_numbers_at_one_location_do_not_overlap(corner):
    """A network that stays where it is; also in the corner and at the edge, where half of the box is outside."""
    x, y = corner
    drawn = draw_scanpath(black(28, 28), np.array([[[x, y, x + 8.0, y + 8]]] * 8))
    ramp = draw_scanpath(black(28, 28), np.array([[[3.0 * k, 14, 3 * k + 2, 16]] for k in range(8)]))
    for place in range(8):
        colour = ramp[15 * 16 + 6, (3 * place + 1) * 16 - 6]
        assert is_near(drawn, colour, 8).sum() > 100, f"the number {place + 1} is hidden"


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("patch_size", [3, 4])
def test_the_only_bright_place_of_a_photo_is_where_the_box_is_drawn(fit, patch_size):
    """From the source through the preparation, the look, and back: no step is off."""
    source = black(240, 330)
    source[117:123, 192:198] = 255  # its middle is (195, 120)
    preprocess = Preprocess((64, 88), fit=fit, crop_fraction=0.9, mean=(0.0,) * 3, std=(1.0,) * 3)
    values, placement = preprocess(source)
    retina, image = Retina(patch_size, scales=2), torch.from_numpy(values)[None]
    brightest = np.unravel_index(values.sum(0).argmax(), (64, 88))
    location = torch.tensor([[[2 * brightest[1] / 87 - 1, 2 * brightest[0] / 63 - 1]]], dtype=torch.float32)
    seen = retina(image, location)[0, 0, 0].sum(0)
    assert seen.max() == values.sum(0).max()
    (boxes,) = boxes_in_source(retina.boxes(location, (64, 88))[0].numpy(), placement)
    pixel = 1 / placement.matrix[0, 0], 1 / placement.matrix[1, 1]  # an input pixel in those of the source
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert (np.abs(middle - (195, 120)) <= pixel).all()
    np.testing.assert_allclose(boxes[0, 2:] - boxes[0, :2], np.multiply(patch_size, pixel))
    left, top, right, bottom = boxes[0].round().astype(int)
    assert (
        source[top:bottom, left:right].mean() > 0.5 * source.mean() * source.size / source[top:bottom, left:right].size
    )


def test_a_turned_placement_keeps_the_middle_of_a_box():
    placement = Placement(np.array([[0.0, -1, 20], [1, 0, 0]]), (20, 30), (30, 20))  # a quarter turn
    boxes = boxes_in_source(np.array([[[-2.0, 4, 2, 10]]]), placement)
    np.testing.assert_allclose(boxes, [[[4, 18, 10, 22]]])


def test_a_frame_shows_the_patches_so_far_at_their_sharpness():
    first, second = film(300)
    unseen = (0.3 * 100 + 40,) * 3

    def at(frame, x, y):
        return tuple(frame[y * 10 + 5, x * 10 + 5].tolist())

    assert first.shape == (300, 300, 3)
    assert at(first, 5, 6) == (10, 20, 30)  # the patch, upright
    assert at(first, 7, 5) == (200,) * 3
    assert at(first, 9, 9) == (150,) * 3
    assert at(first, 12, 12) == unseen
    assert at(second, 7, 5) == (200,) * 3  # still sharp
    assert at(second, 9, 3) == (50,) * 3  # as sharply as before, and later
    assert at(second, 28, 2) == (50,) * 3
    assert at(second, 21, 22) == (250,) * 3
    assert is_near(first[40:80, 40], VIOLET).all()
    assert is_near(second[200:240, 239], YELLOW).all()


def test_the_probabilities_after_each_glimpse_are_drawn_beside_the_picture():
    probabilities = np.array([[0.2, 0.7, 0.1], [0.9, 0.05, 0.05]])
    frames = film(300, probabilities_TK=probabilities, class_names=("cat", "dog", "owl"), truth=0)
    assert len({frame.shape for frame in frames}) == 1
    assert frames[0].shape[1] > 400
    panels = [frame[:, 320:] for frame in frames]
    assert (panels[0] != panels[1]).any()
    lengths = []
    for panel in panels:  # the longest run of the bright colour is the likeliest class's bar
        rows = is_near(panel, (236, 236, 236), 4).sum(1)
        lengths.append(rows.max())
    assert abs(lengths[1] / lengths[0] - 0.9 / 0.7) < 0.05


def test_a_density_is_drawn_in_the_colours_of_heat_up_to_its_largest_value():
    first, later = np.zeros((30, 30)), np.linspace(0, 2.5, 900).reshape(30, 30)
    first[10:20, 10:20] = 1
    drawn = draw_fixation_density({"first glimpse": first, "later glimpses": later}, title="where")
    hot = np.array(heat(np.ones((1, 1)))[0, 0])
    assert is_near(drawn, hot, 3).sum() >= 100 * 100, "the first map's square is ten times its size"
    empty = draw_fixation_density({"nothing": np.zeros((4, 4))})
    assert empty.ndim == 3


@pytest.mark.parametrize(
    ("image", "boxes", "message"),
    [
        (np.zeros((4, 4), np.uint8), np.zeros((1, 1, 4)), r"a picture is \(H, W, 3\) uint8 RGB, got \(4, 4\) uint8"),
        (np.zeros((0, 4, 3), np.uint8), np.zeros((1, 1, 4)), r"a picture is"),
        (black(4, 4), np.zeros((2, 4)), r"boxes of glimpses are \(T, S, 4\), got \(2, 4\)"),
        (black(4, 4), np.zeros((0, 1, 4)), r"boxes of glimpses are \(T, S, 4\), got \(0, 1, 4\)"),
    ],
)
def test_wrong_shapes_of_picture_and_boxes_are_refused(image, boxes, message):
    with pytest.raises(UsageError, match=message):
        draw_scanpath(image, boxes)
