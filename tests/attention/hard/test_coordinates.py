"""Converted locations of other recurrent-attention code: our retina reads the pixels that this code slices out."""

import numpy as np
import pytest
import torch

from tests.refusals import refuses
from visionattn.attention import Retina, location_from_ram


def sliced(image, location, patch, scales):
    """Read patches as that code does: slices of the padded image that begin at ⌊(u + 1)/2 · W⌋, then means."""
    found = []
    for scale in range(scales):
        side = patch * 2**scale
        padded = np.pad(image, side // 2 + side)
        left, top = (
            int((value + 1) / 2 * length) + side for value, length in zip(location, image.shape[::-1], strict=True)
        )
        cut = padded[top : top + side, left : left + side]
        found.append(cut.reshape(patch, 2**scale, patch, 2**scale).mean((1, 3)))
    return np.stack(found)


@pytest.mark.parametrize("patch", [1, 2, 7, 8])
@pytest.mark.parametrize("size", [(28, 28), (29, 29), (12, 35)])
def test_retina_reads_the_pixels_that_the_other_code_reads(patch, size):
    random = np.random.default_rng(0)
    image = random.random(size)
    theirs = np.concatenate([random.uniform(-1, 1, (40, 2)), [[-1, -1], [0, 0], [0.5, -0.5], [-1, 0.999]]])
    ours = location_from_ram(torch.from_numpy(theirs), size)
    patches = Retina(patch, scales=3)(torch.from_numpy(image)[None, None], ours[None])[0, :, :, 0]
    for location, read in zip(theirs, patches.numpy(), strict=True):
        np.testing.assert_allclose(read, sliced(image, location, patch, 3), atol=1e-12)


def test_patch_of_a_28_pixel_image_begins_at_floor_14_u_plus_14_minus_4():
    u = torch.linspace(-1, 0.999, 57)
    boxes = Retina(8).boxes(location_from_ram(torch.stack([u, u.flip(0)], 1), (28, 28)), (28, 28))[:, 0]
    expected = torch.floor(14 * u + 14) - 4
    torch.testing.assert_close(boxes[:, 0], expected, rtol=0, atol=0)
    torch.testing.assert_close(boxes[:, 1], expected.flip(0), rtol=0, atol=0)


def test_images_of_one_row_are_refused():
    refuses(ValueError, "at least 2 × 2 pixels, got 1 × 9", location_from_ram, torch.zeros(1, 2), (1, 9))
