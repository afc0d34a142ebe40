"""Test the selection of boxes against torchvision's `nms`, class by class."""

import torch
from torchvision.ops import nms

from visionattn.models.detectors.detector import detections


def test_detections_match_a_slow_suppression():
    torch.manual_seed(0)
    scores = torch.rand(1, 60, 3) ** 3
    corner = torch.rand(1, 60, 2) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(1, 60, 2) * 50], -1)
    (found,) = detections(scores, boxes, (70, 80), iou=0.5, min_score=0.1, max_boxes=20)
    cut = torch.minimum(boxes[0], torch.tensor([80.0, 70, 80, 70]))
    kept = []
    for label in range(3):
        above = (scores[0, :, label] >= 0.1).nonzero()[:, 0]
        kept += [
            (float(scores[0, p, label]), int(p), label) for p in above[nms(cut[above], scores[0, above, label], 0.5)]
        ]
    kept = sorted(kept, reverse=True)[:20]
    torch.testing.assert_close(found["scores"], torch.tensor([score for score, _, _ in kept]))
    assert found["index"].tolist() == [place for _, place, _ in kept]
    assert found["labels"].tolist() == [label for _, _, label in kept]
    torch.testing.assert_close(found["boxes"], cut[[place for _, place, _ in kept]])
