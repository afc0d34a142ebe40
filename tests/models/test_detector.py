"""Test that boxes are selected as by torchvision's `nms` for one class at a time."""

import torch
from torchvision.ops import nms

from visionattn.models.detector import detections


def test_detections_match_non_maximum_suppression_class_by_class():
    torch.manual_seed(0)
    scores = torch.rand(1, 60, 3) ** 3
    corner = torch.rand(1, 60, 2) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(1, 60, 2) * 50], -1)
    (found,) = detections(scores, boxes, (70, 80), iou=0.5, min_score=0.1, max_boxes=20)
    clipped = torch.minimum(boxes[0], torch.tensor([80.0, 70, 80, 70]))
    expected = []
    for label in range(3):
        above = (scores[0, :, label] >= 0.1).nonzero()[:, 0]
        expected += [
            (float(scores[0, p, label]), int(p), label)
            for p in above[nms(clipped[above], scores[0, above, label], 0.5)]
        ]
    expected = sorted(expected, reverse=True)[:20]
    torch.testing.assert_close(found["scores"], torch.tensor([score for score, _, _ in expected]))
    assert found["index"].tolist() == [index for _, index, _ in expected]
    assert found["labels"].tolist() == [label for _, _, label in expected]
    torch.testing.assert_close(found["boxes"], clipped[[index for _, index, _ in expected]])
