"""Test placements against the pixels of preprocessed images."""

import itertools
import math

import numpy as np
import pytest

from visionattn.data import Placement, Preprocess, crop_fraction_of

SIZES = [(40, 60), (61, 33), (32, 32), (7, 200)]
INTERPOLATIONS = ["nearest", "linear", "smooth"]
FITS = ["crop", "letterbox", "stretch"]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("fraction", [1.0, 0.875, 1.15])
def test_placement_maps_a_spot_to_its_position_in_the_input(size, fit, fraction):
    height, width = size
    preprocess = Preprocess((48, 64), fit=fit, crop_fraction=fraction, mean=(0, 0, 0), std=(1, 1, 1))
    picture = np.zeros((height, width, 3), np.uint8)
    top, left = height // 2 - 2, width // 2 - 3
    picture[top : top + 5, left : left + 5] = 255
    image_CHW, placement = preprocess(picture)
    assert image_CHW.shape == (3, 48, 64)
    weights = image_CHW[0] / image_CHW[0].sum()
    rows, columns = np.mgrid[0:48, 0:64] + 0.5
    centre = [(weights * columns).sum(), (weights * rows).sum()]
    expected = placement.to_input(np.array([[left + 2.5, top + 2.5]]))[0]
    if fit != "crop" or size != (7, 200):  # cropping 7 × 200 cuts off the spot
        np.testing.assert_allclose(centre, expected, atol=0.4)
    np.testing.assert_allclose(placement.to_source(placement.to_input([[3.0, 4.0]])), [[3.0, 4.0]])


def carry_by_pixel(placement, heatmap):
    """Resample a heatmap to the source, pixel by pixel, from the definition."""
    height, width = placement.source_size
    rows, columns = heatmap.shape
    out = np.zeros((height, width))
    for y in range(height):
        for x in range(width):
            u, v = placement.matrix @ [x + 0.5, y + 0.5, 1]
            if not (0 <= u <= placement.input_size[1] and 0 <= v <= placement.input_size[0]):
                continue
            c = np.clip(u * columns / placement.input_size[1] - 0.5, 0, columns - 1)
            r = np.clip(v * rows / placement.input_size[0] - 0.5, 0, rows - 1)
            c0, r0 = int(min(c, max(columns - 2, 0))), int(min(r, max(rows - 2, 0)))
            c1, r1 = min(c0 + 1, columns - 1), min(r0 + 1, rows - 1)
            above = heatmap[r0, c0] * (1 - (c - c0)) + heatmap[r0, c1] * (c - c0)
            below = heatmap[r1, c0] * (1 - (c - c0)) + heatmap[r1, c1] * (c - c0)
            out[y, x] = above * (1 - (r - r0)) + below * (r - r0)
    return out


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(13, 21), (30, 17)])
@pytest.mark.parametrize("grid", [(4, 4), (1, 3), (7, 5)])
def test_carried_heatmap_matches_the_definition(fit, size, grid):
    heatmap = np.random.default_rng(0).random(grid).astype(np.float32)
    _, placement = Preprocess((24, 32), fit=fit)(np.zeros((*size, 3), np.uint8))
    np.testing.assert_allclose(placement.carry(heatmap), carry_by_pixel(placement, heatmap), atol=1e-5)


def kernel(distance, interpolation):
    """Return the weight of a cell at a distance from its centre, in cells; for `smooth` Keys 1981, a = −1/2."""
    s = abs(distance)
    if interpolation == "nearest":
        return float(-0.5 < distance <= 0.5)
    if interpolation == "linear":
        return max(0.0, 1 - s)
    return 1.5 * s**3 - 2.5 * s**2 + 1 if s <= 1 else -0.5 * s**3 + 2.5 * s**2 - 4 * s + 2 if s < 2 else 0.0


def carry_by_kernel(placement, heatmap, interpolation):
    """Sum the kernels of all cells of the mirrored heatmap at each pixel, and cut off what exceeds the cells' range."""
    (height, width), (input_h, input_w) = placement.source_size, placement.input_size
    mirrored = np.pad(heatmap.astype(float), 3, mode="symmetric")
    out = np.zeros((height, width))
    for y, x in itertools.product(range(height), range(width)):
        u, v = placement.matrix @ [x + 0.5, y + 0.5, 1]
        if 0 <= u <= input_w and 0 <= v <= input_h:
            c, r = u * heatmap.shape[1] / input_w + 2.5, v * heatmap.shape[0] / input_h + 2.5
            weights_r = [kernel(cell - r, interpolation) for cell in range(mirrored.shape[0])]
            weights_c = [kernel(cell - c, interpolation) for cell in range(mirrored.shape[1])]
            out[y, x] = np.clip(weights_r @ mirrored @ weights_c, heatmap.min(), heatmap.max())
    return out


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("grid", [(4, 4), (1, 3), (7, 2)])
def test_carried_heatmap_matches_a_loop_over_the_kernels_of_the_cells(grid, fit, interpolation):
    heatmap = np.random.default_rng(0).random(grid).astype(np.float32)
    _, placement = Preprocess((24, 32), fit=fit)(np.zeros((20, 24, 3), np.uint8))
    np.testing.assert_allclose(
        placement.carry(heatmap, interpolation), carry_by_kernel(placement, heatmap, interpolation), atol=1e-5
    )


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_carried_heatmaps_are_symmetric_stay_in_range_and_keep_the_values_at_the_centres(interpolation):
    placement = Placement.scaling((77, 99), (24, 32))
    heatmap = np.random.default_rng(3).uniform(0.2, 0.9, (7, 9)).astype(np.float32)
    carried = placement.carry(heatmap, interpolation)
    assert heatmap.min() <= carried.min() <= carried.max() <= heatmap.max()
    np.testing.assert_allclose(carried[5::11, 5::11], heatmap, atol=1e-6)  # cells of 11 × 11 pixels
    assert carried.max() == pytest.approx(carried[5::11, 5::11].max(), abs=1e-6)
    for axis in (0, 1):
        flipped = placement.carry(np.flip(heatmap, axis), interpolation)
        np.testing.assert_allclose(np.flip(flipped, axis), carried, atol=1e-6)
    turned = Placement.scaling((99, 77), (32, 24)).carry(heatmap.T, interpolation)
    np.testing.assert_allclose(turned.T, carried, atol=1e-6)
    np.testing.assert_allclose(placement.carry(np.full((7, 9), 0.3), interpolation), 0.3, atol=1e-6)


def share_of_harmonics(heatmap, interpolation, pixels=32):
    """Return the share of the squared gradient around the harmonics of the cells' frequency.

    The frequencies are those above half a cycle a cell. A grid has no frequency above; the kernel adds them.
    """
    size = heatmap.shape[0] * pixels, heatmap.shape[1] * pixels
    carried = Placement.identity(size).carry(heatmap, interpolation)
    periodic = np.block([[carried, carried[:, ::-1]], [carried[::-1], carried[::-1, ::-1]]])
    rows, columns = np.meshgrid(*(np.abs(np.fft.fftfreq(side, 1 / pixels)) for side in periodic.shape), indexing="ij")
    energy = np.abs(np.fft.fft2(periodic)) ** 2 * (rows**2 + columns**2)
    return energy[np.maximum(rows, columns) >= 0.5].sum() / energy.sum()


def test_smooth_adds_less_of_the_cells_harmonics_than_linear_and_nearest():
    heatmaps = np.random.default_rng(0).random((8, 7, 7))
    nearest, linear, smooth = (
        np.mean([share_of_harmonics(heatmap, interpolation) for heatmap in heatmaps])
        for interpolation in INTERPOLATIONS
    )
    assert nearest > 0.95
    assert 0.25 < linear < 0.45
    assert smooth < 0.7 * linear


@pytest.mark.parametrize("interpolation", ["linear", "smooth"])
def test_carried_heatmap_of_a_rotated_image_matches_the_definition(interpolation):
    rotation = np.array([[0.8, -0.6, 9.0], [0.6, 0.8, -4.0]])
    placement = Placement(rotation, (20, 24), (24, 24))
    heatmap = np.random.default_rng(0).random((6, 6)).astype(np.float32)
    # the tolerance is larger because OpenCV rounds coordinates to 1/32 of a cell, and smooth is linear between pixels
    expected = carry_by_kernel(placement, heatmap, interpolation)
    np.testing.assert_allclose(placement.carry(heatmap, interpolation), expected, atol=0.05)


def test_boxes_mapped_to_the_input_and_back_are_unchanged():
    _, placement = Preprocess(64, fit="letterbox")(np.zeros((30, 50, 3), np.uint8))
    boxes = np.array([[3.0, 4.0, 20.0, 25.0], [0.0, 0.0, 50.0, 30.0]])
    inside = placement.boxes_to_input(boxes)
    assert inside.min() >= 0
    assert inside.max() <= 64
    np.testing.assert_allclose(placement.boxes_to_source(inside), boxes)


def test_padding_is_the_mean_colour_and_values_are_normalised():
    preprocess = Preprocess(32, fit="letterbox", mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    image, placement = preprocess(np.full((16, 32, 3), 255, np.uint8))
    assert (image[:, 0] == 0).all()
    np.testing.assert_allclose(image[:, 16, 16], [0.5 / 0.2, 0.6 / 0.3, 0.7 / 0.4], rtol=1e-6)
    assert placement.seen().all()
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    np.testing.assert_array_equal(preprocess.denormalise(preprocess(picture)[0]), picture)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"size": 0}, "size"),
        ({"size": 32.5}, "size must be a whole number of pixels"),
        ({"size": (3, 32, 32)}, r"two of them \(height, width\), got \(3, 32, 32\)"),
        ({"fit": "squeeze"}, "letterbox"),
        ({"crop_fraction": 0}, "crop_fraction"),
        ({"std": (1, 1, 0)}, "std must be > 0"),
        ({"rounding": "up"}, "rounding must be even or down"),
        ({"channel_order": "gbr"}, "channel_order must be rgb or bgr"),
        ({"interpolation": "cubic"}, "interpolation must be area, nearest, .*, lanczos, got 'cubic'"),
    ],
)
def test_invalid_preprocess_arguments_raise(options, part):
    with pytest.raises(ValueError, match=part):
        Preprocess(**options)


def test_bgr_reverses_the_channels_and_back():
    picture = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    plain, reversed_ = Preprocess(24), Preprocess(24, channel_order="bgr")
    np.testing.assert_array_equal(reversed_(picture)[0], plain(picture)[0][::-1])
    np.testing.assert_array_equal(reversed_.denormalise(reversed_(picture)[0]), picture)


@pytest.mark.parametrize("side", [16, 97, 224, 299])
def test_the_crop_fraction_of_a_frame_gives_that_frame(side):
    for frame in range(side // 2, 2 * side):
        assert math.floor(side / crop_fraction_of(side, frame)) == frame
