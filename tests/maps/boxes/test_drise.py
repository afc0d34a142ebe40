"""D-RISE equals a slow loop over its masks, and finds the part of an image that a box needs."""

import pytest
import torch
from torch import nn

from tests.models.detectors.small import batch, dense, query
from tests.refusals import refuses
from visionattn.errors import UsageError
from visionattn.maps import DRISE

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


class Corner(nn.Module):
    """A box whose score is the mean brightness of the top left quarter, and one of another class with a fixed score."""

    def forward(self, images):
        half = images.shape[2] // 2, images.shape[3] // 2
        boxes = torch.tensor([[1.0, 1, 20, 20], [10, 10, 30, 30]])
        return [
            {
                "boxes": boxes,
                "scores": torch.stack([image[:, : half[0], : half[1]].mean(), torch.tensor(0.5)]),
                "labels": torch.tensor([0, 1]),
            }
            for image in images
        ]


def test_drise_is_hot_where_the_box_needs_the_image():
    maps, other = DRISE(200, grid=4)(Corner(), torch.ones(2, 3, 32, 40))[0].raw
    quarter = torch.zeros(*maps.shape, dtype=torch.bool)
    quarter[: maps.shape[0] // 2, : maps.shape[1] // 2] = True
    assert maps[quarter].mean() > maps[~quarter].mean() + 0.04
    torch.testing.assert_close(other, torch.full_like(other, 0.5))  # this score does not depend on the image


def test_drise_is_the_mean_of_masks_weighted_by_similarity():
    torch.manual_seed(0)
    detector, images = dense().eval(), batch(2)[0]
    method = DRISE(5, grid=3, batch_size=2, seed=7)
    found = method(detector, images, min_score=0.0, max_boxes=3)
    generator = torch.Generator().manual_seed(7)
    size = tuple(images.shape[2:])
    masks = torch.cat([method._draw(count, size, generator) for count in (2, 2, 1)])
    assert masks.shape == (5, *size)
    assert 0 <= masks.min() < 0.2 < 0.8 < masks.max() <= 1
    for image, explained in zip(images, found, strict=True):
        expected = torch.zeros(3, 12, 12)
        total = torch.zeros(12, 12)
        for mask in masks:
            with torch.no_grad():
                (other,) = detector((image * mask)[None])
            fine = torch.nn.functional.adaptive_avg_pool2d(mask[None], 12)[0]
            total += fine
            for rank in range(3):
                weight = 0.0
                for box, score, label in zip(other["boxes"], other["scores"], other["labels"], strict=True):
                    own = explained.boxes[rank]
                    sides = (torch.minimum(box[2:], own[2:]) - torch.maximum(box[:2], own[:2])).clamp(min=0)
                    union = (box[2:] - box[:2]).prod() + (own[2:] - own[:2]).prod() - sides.prod()
                    if label == explained.labels[rank]:
                        weight = max(weight, float(sides.prod() / union * score))
                expected[rank] += weight * fine
        torch.testing.assert_close(explained.raw, expected / total, atol=1e-5, rtol=1e-4)


def test_drise_fits_detectors_without_gradients_and_images_without_boxes():
    detector, images = query().eval(), batch(2)[0]
    with torch.inference_mode():
        assert DRISE(4, batch_size=3)(detector, images, min_score=0.0, max_boxes=2)[0].heatmaps.shape[0] == 2
        maps = DRISE(4, batch_size=3)(detector, images, min_score=1.1)
    assert [len(explained.heatmaps) for explained in maps] == [0, 0]


def test_options_out_of_range_are_errors():
    refuses(UsageError, "must be ≥ 1 and probability in", DRISE, 0)
    refuses(UsageError, r"probability in \(0, 1\), got 500, 16, 16 and 1", DRISE, probability=1)
