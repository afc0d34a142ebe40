"""Test that TorchvisionDetector returns torchvision's own losses and predictions."""

from functools import partial

import pytest
import torch
from torchvision.models.detection import FCOS, FasterRCNN, RetinaNet

from tests.models.detectors.small import batch, pyramid
from visionattn.models import TorchvisionDetector

KINDS = {
    "fcos": partial(FCOS, score_thresh=0.0),
    "retinanet": partial(RetinaNet, score_thresh=0.0),
    "faster": partial(FasterRCNN, box_score_thresh=0.0),
}


@pytest.mark.parametrize("kind", KINDS)
def test_boxes_are_not_rounded_to_bfloat16(kind):
    """bfloat16 has eight bits of precision, so it cannot represent every pixel position above 256."""
    torch.manual_seed(0)
    detector = TorchvisionDetector(KINDS[kind], pyramid(), 4).eval()
    images, boxes, labels = batch(2, side=96)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = detector(images)[0]
        losses = detector.train().losses(images, boxes, labels)
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    inner = found["boxes"][(found["boxes"] > 0) & (found["boxes"] < 96)]
    assert not torch.equal(inner, inner.bfloat16().float())
    assert all(loss.dtype == torch.float32 for loss in losses.values())


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_boxes_match_torchvision(kind):
    torch.manual_seed(0)
    detector = TorchvisionDetector(KINDS[kind], pyramid(), 4)
    images, boxes, labels = batch(2)
    shift = int(kind == "faster")
    targets = [{"boxes": b, "labels": n + shift} for b, n in zip(boxes, labels, strict=True)]
    torch.manual_seed(1)
    losses = detector.train().losses(images, boxes, labels)
    torch.manual_seed(1)
    expected = detector.detector(list(images), targets)
    assert losses.keys() == expected.keys()
    for name in losses:
        torch.testing.assert_close(losses[name], expected[name], rtol=1e-3, atol=1e-4)
    sum(losses.values()).backward()
    assert not [name for name, parameter in detector.named_parameters() if parameter.grad is None]
    with torch.no_grad():
        found = detector.eval()(images)
        expected = detector.detector(list(images))
    for image, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(image["boxes"], reference["boxes"][:100])
        assert (image["labels"] == reference["labels"][:100] - shift).all()
        assert image["labels"].min() >= 0
        assert image["labels"].max() < 4
        assert image["boxes"].min() >= 0
        assert image["boxes"].max() <= 64  # pixels of the input, which torchvision does not resize
