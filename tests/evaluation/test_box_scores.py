"""Metrics of detectors' heatmaps, on maps with known results."""

import pytest
import torch
from torch import nn
from torchvision.ops import box_iou

from visionattn.evaluation.box_scores import box_pointing, mass_ratio, score_drop

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


def test_mass_ratio_and_box_pointing_of_known_maps():
    boxes = torch.tensor([[0.0, 0, 10, 10], [8, 4, 24, 20], [3, 3, 4, 4]])
    torch.testing.assert_close(mass_ratio(torch.ones(3, 8, 8), boxes, (32, 32)), torch.ones(3))
    heat = torch.zeros(3, 32, 32)
    heat[0, :10, :10] = 1
    heat[1, 4:12, 8:24] = 1
    heat[1, 20:28, 8:24] = 1  # half of the heat is below the box
    heat[2, 20, 20] = 1
    expected = torch.tensor([1024 / 100, 0.5 * 1024 / 256, 0.0])
    torch.testing.assert_close(mass_ratio(heat, boxes, (32, 32)), expected)
    assert box_pointing(heat, boxes, (32, 32)).tolist() == [1, 0.5, 0]


class Bright(nn.Module):
    """A detector whose first two boxes have scores proportional to the brightness of a square.

    The first box has class 0 and the second box class 1. The third box has class 0, a constant score, and an IoU of 1/3
    with the first box.
    """

    def forward(self, images):
        detections = []
        for image in images:
            score = image[:, 2:6, 2:6].mean().clamp(0, 1)
            boxes = torch.tensor([[2.0, 2, 6, 6], [2, 2, 6, 6], [4, 2, 8, 6]])
            scores = torch.stack([score, score / 2, torch.tensor(0.2)])
            detections.append({"boxes": boxes, "scores": scores, "labels": torch.tensor([0, 1, 0])})
        return detections


def test_score_drops_only_when_the_heatmap_covers_the_square():
    images = torch.zeros(1, 3, 16, 16)
    images[:, :, 2:6, 2:6] = 0.9
    heat = torch.zeros(3, 16, 16)
    heat[0, 2:6, 2:6] = 1
    heat[1:, 10:14, 10:14] = 1
    from visionattn.maps import BoxHeatmaps

    (found,) = Bright()(images)
    maps = [BoxHeatmaps(found["boxes"], found["scores"], found["labels"], heat, heat, "", "")]
    (drop,) = score_drop(Bright(), images, maps, fraction=1 / 16)
    mean = 0.9 / 16  # mean colour of the image, which replaces the square
    torch.testing.assert_close(drop, torch.tensor([1 - mean / 0.9, 0.0, 0.0]))
    torch.testing.assert_close(box_iou(found["boxes"][:1], found["boxes"]), torch.tensor([[1, 1, 1 / 3]]))
