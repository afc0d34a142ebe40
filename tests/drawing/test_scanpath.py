"""Scanpaths, animations and fixation densities show every glimpse at its location in the source."""

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
"""Approximate colours of the first and the last glimpse."""


def black(height, width):
    return np.zeros((height, width, 3), np.uint8)


def is_near(pixels, colour, by=25):
    return (np.abs(pixels.astype(int) - colour) <= by).all(-1)


def test_a_box_is_drawn_inside_its_edges_after_the_picture_is_enlarged_by_a_whole_factor():
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
def test_pictures_of_any_size_are_resized_with_their_boxes(shape, side, expected):
    height, width = shape
    # the fine box is centred, half as wide and high as the picture; the coarse box reaches out of the picture
    boxes = np.array([[[width / 4, height / 4, 3 * width / 4, 3 * height / 4], [-9.0, -9, width + 9, height + 9]]])
    drawn = draw_scanpath(black(*shape), boxes, side=side)
    assert drawn.shape[:2] == expected
    columns = np.flatnonzero(is_near(drawn[expected[0] // 2 - expected[0] // 6], VIOLET))
    assert abs(columns[0] - expected[1] / 4) <= 1
    assert abs(columns[-1] + 1 - expected[1] * 3 / 4) <= 1
    assert not drawn[0].any(), "the edges of the coarse box lie outside of the picture"


def test_numbers_have_colours_in_temporal_order_and_only_the_first_has_a_ring():
    boxes = np.array([[[x, 10.0, x + 8, 18]] for x in (2, 10, 18)])
    drawn = draw_scanpath(black(28, 28), boxes)
    for (x, y), colour in zip(centres(boxes) * 16, (VIOLET, (205, 74, 118), YELLOW), strict=True):
        disc = drawn[int(y) - 8 : int(y) + 8, int(x) - 8 : int(x) + 8]
        assert 0.5 < is_near(disc, colour, 40).mean() < 0.98, "a disc of this colour with a number on it"
    white = is_near(drawn, (236, 236, 236), 20)
    rows, columns = np.mgrid[: len(drawn), : drawn.shape[1]] + 0.5
    ring_fractions = []
    for x, y in centres(boxes) * 16:
        distance = np.hypot(rows - y, columns - x)
        ring_fractions.append(white[(distance > 10.8) & (distance < 11.6)].mean())
    assert ring_fractions[0] > 0.9
    assert ring_fractions[1:] == [0, 0]


@pytest.mark.parametrize("corner", [(10, 10), (-4, -4), (24, 10)])
def test_numbers_at_one_location_do_not_overlap(corner):
    """All eight glimpses are at one location: in the picture, in its corner, or at its edge."""
    x, y = corner
    drawn = draw_scanpath(black(28, 28), np.array([[[x, y, x + 8.0, y + 8]]] * 8))
    separate = draw_scanpath(black(28, 28), np.array([[[3.0 * k, 14, 3 * k + 2, 16]] for k in range(8)]))
    for place in range(8):
        colour = separate[15 * 16 + 6, (3 * place + 1) * 16 - 6]
        assert is_near(drawn, colour, 8).sum() > 100, f"the number {place + 1} is hidden"


@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("patch_size", [3, 4])
def test_a_glimpse_of_the_only_bright_spot_has_its_box_at_that_spot_in_the_source(fit, patch_size):
    """Follow the spot from the source through preprocessing and the retina back to the source: no step shifts it."""
    source = black(240, 330)
    source[117:123, 192:198] = 255  # a spot with centre (195, 120)
    preprocess = Preprocess((64, 88), fit=fit, crop_fraction=0.9, mean=(0.0,) * 3, std=(1.0,) * 3)
    values, placement = preprocess(source)
    retina, image = Retina(patch_size, scales=2), torch.from_numpy(values)[None]
    brightest = np.unravel_index(values.sum(0).argmax(), (64, 88))
    location = torch.tensor([[[2 * brightest[1] / 87 - 1, 2 * brightest[0] / 63 - 1]]], dtype=torch.float32)
    patch = retina(image, location)[0, 0, 0].sum(0)
    assert patch.max() == values.sum(0).max()
    (boxes,) = boxes_in_source(retina.boxes(location, (64, 88))[0].numpy(), placement)
    pixel = 1 / placement.matrix[0, 0], 1 / placement.matrix[1, 1]  # size of an input pixel in source pixels
    centre = (boxes[:, :2] + boxes[:, 2:]) / 2
    assert (np.abs(centre - (195, 120)) <= pixel).all()
    np.testing.assert_allclose(boxes[0, 2:] - boxes[0, :2], np.multiply(patch_size, pixel))
    left, top, right, bottom = boxes[0].round().astype(int)
    assert (
        source[top:bottom, left:right].mean() > 0.5 * source.mean() * source.size / source[top:bottom, left:right].size
    )


def test_boxes_are_mapped_through_a_rotated_placement():
    placement = Placement(np.array([[0.0, -1, 20], [1, 0, 0]]), (20, 30), (30, 20))  # a quarter turn
    boxes = boxes_in_source(np.array([[[-2.0, 4, 2, 10]]]), placement)
    np.testing.assert_allclose(boxes, [[[4, 18, 10, 22]]])


def test_a_frame_shows_all_patches_so_far_and_the_finer_patch_where_two_overlap():
    first, second = film(300)
    unread = (0.3 * 100 + 40,) * 3

    def pixel(frame, x, y):
        return tuple(frame[y * 10 + 5, x * 10 + 5].tolist())

    assert first.shape == (300, 300, 3)
    assert pixel(first, 5, 6) == (10, 20, 30)  # the marked pixel of the fine patch: the patch is not flipped
    assert pixel(first, 7, 5) == (200,) * 3
    assert pixel(first, 9, 9) == (150,) * 3  # coarse patch of the first glimpse
    assert pixel(first, 12, 12) == unread
    assert pixel(second, 7, 5) == (200,) * 3  # the first fine patch, not the second coarse one
    assert pixel(second, 9, 3) == (50,) * 3  # two coarse patches overlap: the later one is shown
    assert pixel(second, 28, 2) == (50,) * 3
    assert pixel(second, 21, 22) == (250,) * 3
    assert is_near(first[40:80, 40], VIOLET).all()
    assert is_near(second[200:240, 239], YELLOW).all()


def test_the_class_probabilities_are_drawn_beside_the_picture():
    probabilities = np.array([[0.2, 0.7, 0.1], [0.9, 0.05, 0.05]])
    frames = film(300, probabilities_TK=probabilities, class_names=("cat", "dog", "owl"), truth=0)
    assert len({frame.shape for frame in frames}) == 1
    assert frames[0].shape[1] > 400
    panels = [frame[:, 320:] for frame in frames]
    assert (panels[0] != panels[1]).any()
    lengths = []
    for panel in panels:  # the row with most bright pixels is in the bar of the likeliest class
        rows = is_near(panel, (236, 236, 236), 4).sum(1)
        lengths.append(rows.max())
    assert abs(lengths[1] / lengths[0] - 0.9 / 0.7) < 0.05


def test_a_fixation_density_is_scaled_to_its_largest_value():
    square, ramp = np.zeros((30, 30)), np.linspace(0, 2.5, 900).reshape(30, 30)
    square[10:20, 10:20] = 1
    drawn = draw_fixation_density({"first glimpse": square, "later glimpses": ramp}, title="where")
    hot = np.array(heat(np.ones((1, 1)))[0, 0])
    assert is_near(drawn, hot, 3).sum() >= 100 * 100, "the square is enlarged tenfold"
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
