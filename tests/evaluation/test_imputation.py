"""ROAD: removed pixels satisfy the equations of the paper, and the score equals a slow loop."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.evaluation.scored import Patch, bright_pictures, region
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.evaluation import impute, road
from visionattn.evaluation.faithfulness import rank

NEIGHBOURS = {(r, c): (1 / 6 if r * c == 0 else 1 / 12) for r in (-1, 0, 1) for c in (-1, 0, 1) if (r, c) != (0, 0)}


def pictures(count, height, width, channels=3):
    """Return smooth images, whose pixels are related as those of photographs are."""
    noise = torch.randn(count, channels, height + 4, width + 4, generator=torch.Generator().manual_seed(0))
    return 2 + 5 * F.avg_pool2d(noise, 5, 1)


def by_the_equations(image_CHW, gone_HW):
    """Write down one equation for each removed pixel, and solve them with NumPy."""
    height, width = gone_HW.shape
    places = [tuple(place) for place in gone_HW.nonzero().tolist()]
    left, right = np.zeros((len(places), len(places))), np.zeros((len(places), len(image_CHW)))
    for row, (y, x) in enumerate(places):
        for (dy, dx), weight in NEIGHBOURS.items():
            if 0 <= y + dy < height and 0 <= x + dx < width:
                left[row, row] += weight
                if gone_HW[y + dy, x + dx]:
                    left[row, places.index((y + dy, x + dx))] -= weight
                else:
                    right[row] += weight * image_CHW[:, y + dy, x + dx].double().numpy()
    filled = image_CHW.clone()
    for (y, x), values in zip(places, np.linalg.solve(left, right), strict=True):
        filled[:, y, x] = torch.from_numpy(values)
    return filled


@pytest.mark.parametrize("fraction", [0.03, 0.5, 0.95])
@pytest.mark.parametrize("blocks", [False, True], ids=["pixels", "blocks"])
def test_removed_pixels_satisfy_the_equations(fraction, blocks):
    images = pictures(3, 11, 14)
    heat = torch.rand(3, 1, 3, 4, generator=torch.Generator().manual_seed(1))
    heat = F.interpolate(heat, (11, 14), mode="bilinear") if blocks else torch.rand(3, 1, 11, 14)
    gone = rank(heat[:, 0], (11, 14)) < round(fraction * 11 * 14)
    filled = impute(images, gone, noise=0)
    expected = torch.stack([by_the_equations(*pair) for pair in zip(images, gone, strict=True)])
    assert float((filled - expected).abs().max() / images.std()) < 1e-3
    assert torch.equal(filled[~gone[:, None].expand_as(filled)], images[~gone[:, None].expand_as(filled)])


@pytest.mark.filterwarnings("ignore:__array_wrap__:DeprecationWarning")  # grad-cam passes tensors to NumPy
def test_removed_pixels_equal_those_of_grad_cam():
    peer = pytest.importorskip("pytorch_grad_cam.metrics.road").NoisyLinearImputer(noise=0)
    images, heat = pictures(2, 40, 56), F.interpolate(torch.rand(2, 1, 5, 7), (40, 56), mode="bilinear")[:, 0]
    gone = rank(heat, (40, 56)) < 0.8 * 40 * 56
    expected = torch.stack([peer(image, (~mask).float()) for image, mask in zip(images, gone, strict=True)])
    assert float((impute(images, gone, noise=0) - expected).abs().max() / images.std()) < 2e-3


def test_noise_is_added_to_removed_pixels_only_and_depends_on_the_seed():
    images, gone = pictures(1, 64, 64), torch.zeros(1, 64, 64, dtype=torch.bool)
    gone[:, 8:56, 8:56] = True
    plain, noisy, again, other = (
        impute(images, gone, noise=noise, seed=seed) for noise, seed in ((0, 0), (0.1, 3), (0.1, 3), (0.1, 4))
    )
    added = (noisy - plain)[gone[:, None].expand_as(plain)]
    assert float(added.std() / images.std()) == pytest.approx(0.1, rel=0.05)
    assert torch.equal(noisy[~gone[:, None].expand_as(plain)], images[~gone[:, None].expand_as(plain)])
    assert torch.equal(noisy, again)
    assert not torch.equal(noisy, other)


def test_an_image_without_known_pixels_gets_its_mean_colour_and_one_without_gaps_is_unchanged():
    images = pictures(2, 8, 8)
    gone = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]).bool()
    filled = impute(images, gone, noise=0)
    torch.testing.assert_close(filled[0], images[0].mean((1, 2), keepdim=True).expand(3, 8, 8))
    assert torch.equal(filled[1], images[1])


def test_road_equals_a_slow_loop():
    place = region()
    model, images = Patch(place), bright_pictures(place, count=4)
    heatmaps = torch.rand(4, 6, 8, generator=torch.Generator().manual_seed(2))
    order = rank(heatmaps, (12, 16), seed=5)
    expected = torch.zeros(4)
    for index in range(4):
        for fraction in (0.2, 0.6):
            removed = round(fraction * 12 * 16)
            for sign, gone in ((1, order[index] >= 192 - removed), (-1, order[index] < removed)):
                filled = by_the_equations(images[index], gone)
                expected[index] += sign * model(filled[None]).softmax(1)[0, 1] / 2
    found = road(model, images, heatmaps, fractions=(0.2, 0.6), noise=0, batch_size=3, seed=5, target=1)
    torch.testing.assert_close(found, expected.detach(), atol=2e-3, rtol=0)


def test_the_true_map_has_the_highest_road_and_its_inverse_the_lowest():
    place = region()
    model, images = Patch(place), bright_pictures(place)
    true, inverse, flat = place.float(), (~place).float(), torch.zeros(12, 16)
    scores = [float(road(model, images, heat.expand(24, -1, -1)).mean()) for heat in (true, flat, inverse)]
    assert scores[0] > 0.2
    assert scores[1] == pytest.approx(0, abs=0.05)
    assert scores[2] == pytest.approx(-scores[0], abs=0.02)


def test_wrong_fractions_and_images_are_errors():
    model, images = Patch(region()), bright_pictures(region(), count=2)
    for fractions in ((), (0.0,), (0.5, 1.0)):
        refuses(
            UsageError,
            r"fractions must be in \(0, 1\)",
            lambda fractions=fractions: road(model, images, images[:, 0], fractions=fractions),
        )
    refuses(DataError, "NaN", lambda: road(model, images * torch.nan, images[:, 0]))
