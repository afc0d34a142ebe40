"""ODAM equals gradients by hand on every level of a pyramid, and fits every detector."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.models.detection import FCOS, fcos_resnet50_fpn

from tests.maps.boxes.toy import ToyDetector
from tests.models.detectors.small import batch, dense, pyramid, query
from visionattn.maps import ODAM
from visionattn.models import TorchvisionDetector

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


def test_odam_is_gradient_times_activation_spread_over_the_finest_map():
    torch.manual_seed(0)
    images = torch.rand(2, 3, 4, 6)
    images[:, 2] += 1  # makes gradient × activation positive for the second box
    maps, maps_of_first = (
        ODAM()(ToyDetector(), images, min_score=0.0),
        ODAM("first")(ToyDetector(), images, min_score=0.0),
    )
    for n in range(2):
        fine, coarse = images[n] * 2, nn.functional.avg_pool2d(images[n], 2)
        s = (fine[0, 1, 2] + 2 * fine[1, 1, 3]).sigmoid()
        first = torch.zeros(4, 6)
        first[1, 2], first[1, 3] = s * (1 - s) * fine[0, 1, 2], s * (1 - s) * 2 * fine[1, 1, 3]
        torch.testing.assert_close(maps[n].raw[0], first)
        torch.testing.assert_close(maps_of_first[n].raw[0], first)  # half the activation, twice the gradient
        s = (coarse[2, 0, 1] - coarse[0, 0, 1]).sigmoid()
        second = torch.zeros(1, 1, 2, 3)
        second[0, 0, 0, 1] = s * (1 - s) * (coarse[2, 0, 1] - coarse[0, 0, 1])
        fine_second = nn.functional.interpolate(second, size=(4, 6), mode="bilinear", align_corners=False)[0, 0] / 4
        torch.testing.assert_close(maps[n].raw[1], fine_second)
    assert maps[0].method == "odam"
    assert maps[0].source == "score by features"


class MapsBeyondTheImage(nn.Module):
    """Two maps of an image of 6 × 10 pixels; the map of stride 4 covers 8 × 12 pixels."""

    strides = (2, 4)

    def forward(self, images):
        return [nn.functional.avg_pool2d(images, stride, ceil_mode=True) for stride in self.strides]


class CornerDetector(nn.Module):
    """One box, whose score is the last cell of the coarse map."""

    def __init__(self):
        super().__init__()
        self.features = MapsBeyondTheImage()

    def forward(self, images):
        _, coarse = self.features(images)
        box = torch.tensor([[2.0, 2, 10, 6]])
        return [{"boxes": box, "scores": x[0, 1, 2][None], "labels": torch.tensor([0])} for x in coarse]


def test_odam_aligns_levels_that_extend_beyond_the_image():
    (maps,) = ODAM()(CornerDetector(), torch.ones(1, 3, 6, 10), min_score=0.0)
    coarse = torch.zeros(2, 3)
    coarse[1, 2] = 1
    expected = torch.zeros(3, 5)  # four of these cells cover one coarse cell
    for row in range(3):
        for column in range(5):
            y, x = (2 * row + 1) / 4 - 0.5, (2 * column + 1) / 4 - 0.5  # in coarse cells, from the first cell's centre
            for r in (math.floor(y), math.floor(y) + 1):
                for c in (math.floor(x), math.floor(x) + 1):
                    weight = (1 - abs(y - r)) * (1 - abs(x - c)) / 4
                    expected[row, column] += weight * coarse[min(max(r, 0), 1), min(max(c, 0), 2)]
    torch.testing.assert_close(maps.raw[0], expected)
    assert maps.raw[0, 2, 4] == maps.raw.max()


@pytest.mark.parametrize("kind", ["dense", "one map", "query", "vit", "torchvision", "torchvision's own"])
def test_odam_fits_every_detector(kind):
    torch.manual_seed(0)
    images, *_ = batch(2)
    if kind == "torchvision":
        detector = TorchvisionDetector(partial(FCOS, score_thresh=0.0), pyramid(), 4)
    elif kind == "torchvision's own":
        detector = fcos_resnet50_fpn(
            weights=None, weights_backbone=None, num_classes=4, score_thresh=0.0, min_size=64, max_size=64
        )
    else:
        detector = {
            "dense": dense,
            "one map": lambda: dense(strides=(8,)),
            "query": query,
            "vit": lambda: dense(backbone="vit_tiny_patch16_224"),
        }[kind]()
    maps = ODAM()(detector, images, min_score=0.0, max_boxes=3)
    assert [len(explained.heatmaps) for explained in maps] == [3, 3]
    for explained in maps:
        assert explained.heatmaps.amax((1, 2)).max() == 1
