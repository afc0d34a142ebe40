"""Test the retina against loops over pixels."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from visionattn.attention import Retina
from visionattn.errors import UsageError

GEOMETRIES = [  # H, W, C, patch, scales, factor
    (9, 14, 2, (3, 4), 3, 2),
    (5, 5, 1, (8, 7), 2, 3),
    (12, 7, 3, (1, 1), 1, 2),
    (1, 1, 1, (2, 2), 2, 2),
]
WIDTH = 20
RAMP = torch.arange(float(WIDTH)).expand(1, 1, 5, WIDTH)


def by_pixels(image, location, retina, background):
    """Read the patches at one location of one image pixel by pixel; if sub-pixel, interpolate between block means."""
    channels, *size = image.shape
    out = torch.zeros(retina.scales, channels, *retina.patch_size, dtype=image.dtype)

    def pixel(c, y, x):
        return image[c, y, x] if 0 <= y < size[0] and 0 <= x < size[1] else background[c]

    for scale in range(retina.scales):
        f = retina.factor**scale
        starts = []
        for axis in (0, 1):
            centre = (float(location[1 - axis]) + 1) / 2 * (size[axis] - 1)
            start = centre - (f * retina.patch_size[axis] - 1) / 2
            starts.append(start / f if retina.subpixel else math.floor(start + 0.5))
        unit = f if retina.subpixel else 1  # distance in pixels between the f × f blocks that are interpolated
        (top, down), (left, right) = ((math.floor(start), start - math.floor(start)) for start in starts)
        for c, i, j in itertools.product(range(channels), *map(range, retina.patch_size)):
            for dy, dx in itertools.product((0, 1), (0, 1)):
                weight = (down if dy else 1 - down) * (right if dx else 1 - right)
                if weight:
                    block = itertools.product(range(f), range(f))
                    y, x = (unit * (start + more) + f * step for start, more, step in ((top, dy, i), (left, dx, j)))
                    out[scale, c, i, j] += weight * sum(pixel(c, y + a, x + b) for a, b in block) / f**2
    return out


def random_locations(count, seed=0):
    """Return locations (2, count, 2): two corners, one location outside the image, and random locations."""
    locations = torch.rand(2, count, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    locations[0, :3] = torch.tensor([[-1.0, 1.0], [1.0, -1.0], [1.5, -3.0]])
    return locations


@pytest.mark.parametrize("subpixel", [False, True])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_retina_matches_a_loop_over_pixels(geometry, subpixel):
    height, width, channels, patch, scales, factor = geometry
    images = torch.randn(2, channels, height, width, dtype=torch.float64)
    locations = random_locations(5)
    background = [0.5 - c for c in range(channels)]
    retina = Retina(patch, scales=scales, factor=factor, background=background, subpixel=subpixel)
    patches = retina(images, locations)
    assert patches.shape == (2, 5, scales, channels, *patch)
    for b, r in itertools.product(range(2), range(5)):
        torch.testing.assert_close(patches[b, r], by_pixels(images[b], locations[b, r], retina, background))
    torch.testing.assert_close(retina(images[1:], locations[1:]), patches[1:])  # a batch of one


@pytest.mark.parametrize("patch", [3, 4])
def test_plus_and_minus_one_are_the_centres_of_the_outermost_pixels(patch):
    image = torch.zeros(1, 1, 6, 9)
    image[0, 0, 0, 0], image[0, 0, 5, 8] = 1, 2
    patches = Retina(patch)(image, torch.tensor([[[-1.0, -1.0], [1.0, 1.0]]]))[0, :, 0, 0]
    middle = (
        patch - 1
    ) // 2  # an even patch has no central pixel: half pixels are rounded up, so the patch moves down and right
    assert patches[0, middle, middle] == 1
    assert patches[1, middle, middle] == 2
    assert patches.sum() == 3


def test_subpixel_retina_is_exact_at_whole_pixels():
    images = torch.randn(1, 2, 11, 11, dtype=torch.float64)
    locations = torch.tensor([[[-1.0, 0.4], [0.0, 0.0], [1.0, -0.2]]], dtype=torch.float64)
    # these locations are whole pixels: (size − 1) / 2 = 5 pixels per unit
    for patch in (1, 3, 5):
        exact, interpolated = (
            Retina(patch, scales=1, subpixel=subpixel)(images, locations) for subpixel in (False, True)
        )
        torch.testing.assert_close(exact, interpolated)


def test_subpixel_gradient_matches_finite_differences():
    images = torch.randn(1, 2, 6, 5, dtype=torch.float64, requires_grad=True)
    locations = torch.tensor([[[0.13, -0.37], [-0.71, 0.59]]], dtype=torch.float64, requires_grad=True)
    retina = Retina((2, 3), scales=2, subpixel=True)
    assert torch.autograd.gradcheck(retina, (images, locations))
    exact = Retina((2, 3), scales=2)(images, locations)
    assert torch.autograd.grad(exact.sum(), locations, allow_unused=True)[0] is None


def test_boxes_are_the_pixels_of_the_patches():
    """A patch shows a bright pixel if and only if the pixel is in the patch's box."""
    retina = Retina((3, 2), scales=3)
    for y, x in itertools.product(range(7), range(10)):
        image = torch.zeros(1, 1, 7, 10)
        image[0, 0, y, x] = 1
        locations = random_locations(6)[:1].float()
        boxes = retina.boxes(locations, (7, 10))[0]
        inside = (boxes[..., 0] <= x) & (x + 1 <= boxes[..., 2]) & (boxes[..., 1] <= y) & (y + 1 <= boxes[..., 3])
        assert torch.equal(retina(image, locations)[0].flatten(2).sum(-1) > 0, inside)


def test_a_patch_of_even_size_covers_one_pixel_more_after_the_location():
    columns = torch.arange(32.0).expand(1, 1, 32, 32)
    patch = Retina(8)(columns, torch.full((1, 1, 2), 2 * 10 / 31 - 1))
    assert patch[0, 0, 0, 0, 0].tolist() == [7, 8, 9, 10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("grid_sample", "convert"),
    [
        (lambda u: F.grid_sample(RAMP, u, align_corners=False), lambda u: u * WIDTH / (WIDTH - 1)),
        (lambda u: F.grid_sample(RAMP, u, align_corners=True), lambda u: u),
    ],
    ids=["edges", "centres"],
)
def test_locations_of_grid_sample_convert_as_the_readme_says(grid_sample, convert):
    """Each pixel's value is its column, so a retina of one pixel returns the column of a location."""
    u = torch.linspace(-0.9, 0.9, 11)
    grid = torch.stack([u, torch.zeros(11)], -1)[None, None]
    locations = torch.stack([convert(u), torch.zeros(11)], -1)[None]
    columns = Retina(1, subpixel=True)(RAMP, locations).flatten()
    torch.testing.assert_close(columns, grid_sample(grid).flatten())
    torch.testing.assert_close(columns, (convert(u) + 1) / 2 * (WIDTH - 1))


def test_one_view_serves_several_locations_dtypes_and_memory_formats():
    images, locations = torch.randn(2, 3, 8, 8), random_locations(4).float()
    retina = Retina(3, scales=2)
    view = retina.view(images)
    torch.testing.assert_close(retina.look(view, locations[:, 1:2]), retina(images, locations)[:, 1:2])
    half = retina(images.bfloat16(), locations)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.float(), retina(images, locations), atol=0.05, rtol=0.02)
    channels_last = retina(images.contiguous(memory_format=torch.channels_last), locations)
    torch.testing.assert_close(channels_last, retina(images, locations))


@pytest.mark.parametrize("subpixel", [False, True])
def test_retina_compiles_in_one_graph_and_exports(subpixel):
    images, locations = torch.randn(2, 3, 9, 8), random_locations(4).float()
    retina = Retina(4, scales=2, subpixel=subpixel)
    compiled = torch.compile(retina, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images, locations), retina(images, locations))
    exported = torch.export.export(retina, (images, locations)).module()
    torch.testing.assert_close(exported(images, locations), retina(images, locations))


def test_invalid_retina_arguments_raise():
    for options in ({"patch_size": 0}, {"patch_size": 3, "scales": 0}, {"patch_size": 3, "factor": 1}):
        with pytest.raises(ValueError, match="a retina needs"):
            Retina(**options)
    with pytest.raises(
        UsageError, match="background has 2 values and the images have 3 channels; give one value, or one per channel"
    ):
        Retina(3, background=(0.0, 1.0))(torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 2))
