"""Test the dense head against slow loops from the papers' rules."""

import math

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from tests.models.detectors.small import batch, dense, learn
from visionattn.models.detectors.dense import DenseHead, paired_iou, quality_focal

STRIDES = (8, 16, 32)


def maps(size=96, batch=2, channels=16):
    return [torch.randn(batch, channels, size // stride, size // stride) for stride in STRIDES]


def places():
    return [
        ((column + 0.5) * s, (row + 0.5) * s, s) for s in STRIDES for row in range(96 // s) for column in range(96 // s)
    ]


def assigned(logits, found, boxes, labels, radius=1.5, topk=10, beta=2.0):
    """Return {cell: (box, quality)} of an image, rule by rule, cell by cell."""
    wanted = {}
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        aligned = []
        for place, (x, y, s) in enumerate(places()):
            near = abs(x - (x1 + x2) / 2) < radius * s and abs(y - (y1 + y2) / 2) < radius * s
            if near and min(x - x1, y - y1, x2 - x, y2 - y) > 0:
                overlap = float(box_iou(found[place][None], torch.tensor([[x1, y1, x2, y2]])))
                aligned.append((float(logits[place, labels[number]].sigmoid()) * overlap**beta, overlap, place))
        for aligned_with, overlap, place in sorted(aligned, reverse=True)[:topk]:
            wanted.setdefault(place, []).append((overlap, number, aligned_with))
    taken = {place: max(those) for place, those in wanted.items()}
    out = {}
    for number in range(len(boxes)):
        those = {place: (t, overlap) for place, (overlap, n, t) in taken.items() if n == number}
        for place, (t, _) in those.items():
            best = max(t for t, _ in those.values()), max(overlap for _, overlap in those.values())
            out[place] = number, t / best[0] * best[1]
    return out


BOXES = [[[10.0, 12, 40, 50], [15, 15, 30, 33], [2, 2, 95, 94]], [[50.0, 60, 53, 63], [0, 0, 90, 20], [0.0, 0, 96, 96]]]
LABELS = [torch.tensor([1, 3, 0]), torch.tensor([2, 2, 0])]


def head_that_answers():
    """Make a head whose predictions differ from cell to cell, and its predictions for two images."""
    torch.manual_seed(0)
    head = DenseHead(4, STRIDES, 16)
    with torch.no_grad():
        head.classify.weight.mul_(30)
        head.regress.weight.mul_(10)
        return head, head(maps())


def test_cells_are_assigned_by_the_rules():
    head, found = head_that_answers()
    assert found.places.tolist() == [list(place) for place in places()]
    there = torch.ones(2, 3, dtype=torch.bool)
    there[1, 2] = False
    number, quality = head.assign(found, torch.tensor(BOXES), torch.stack(LABELS), there)
    for image, count in enumerate([3, 2]):
        slow = assigned(found.logits[image], found.boxes[image], BOXES[image][:count], LABELS[image])
        assert [slow.get(place, (-1, 0))[0] for place in range(len(places()))] == number[image].tolist()
        assert [slow.get(place, (-1, 0))[1] for place in range(len(places()))] == pytest.approx(quality[image].tolist())
    assert set(number[0].tolist()) == {-1, 0, 1, 2}
    assert (number[0] == 2).sum() == head.topk  # of 21 cells


def test_losses_match_the_equation():
    head, found = head_that_answers()
    boxes, labels = [torch.tensor(BOXES[0]), torch.tensor(BOXES[1][:2])], [LABELS[0], LABELS[1][:2]]
    losses = head.losses(found, boxes, labels)
    class_sum, box_sum, total = 0.0, 0.0, 0.0
    for image in range(2):
        chosen = assigned(found.logits[image], found.boxes[image], boxes[image].tolist(), labels[image])
        for place in range(len(places())):
            goal = torch.zeros(4)
            if place in chosen:
                number, quality = chosen[place]
                goal[labels[image][number]] = quality
                pair = found.boxes[image, place][None], boxes[image][number][None]
                box_sum += 2 * quality * (1 - float(generalized_box_iou(*pair)))
                total += quality
            p = found.logits[image, place].sigmoid()
            bce = -(goal * p.log() + (1 - goal) * (1 - p).log())
            class_sum += float(((goal - p) ** 2 * bce).sum())
    assert total > 1
    assert float(losses["class"]) == pytest.approx(class_sum / total, rel=1e-4)
    assert float(losses["box"]) == pytest.approx(box_sum / total, rel=1e-4)


def test_boxes_are_decoded_from_the_sides():
    head = DenseHead(2, (8,), 16)
    with torch.no_grad():
        head.regress.weight.zero_()
        head.regress.bias.copy_(torch.tensor([0.0, 0.5, 1.0, 1.5]))
        found = head([torch.randn(1, 16, 3, 4)])
    left, top, right, bottom = (8 * math.exp(value) for value in (0, 0.5, 1, 1.5))
    expected = [[x - left, y - top, x + right, y + bottom] for x, y, _ in found.places.tolist()]
    torch.testing.assert_close(found.boxes[0], torch.tensor(expected))


@pytest.mark.parametrize("make", [dense], ids=["dense"])
def test_images_without_boxes_lower_the_scores(make):
    images, boxes, labels = batch(2)
    empty = [some[:0] for some in boxes], [some[:0] for some in labels]
    detector = make()
    losses = detector.losses(images, *empty)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert detector.head.classify.bias.grad.gt(0).all()  # scores decrease
    mixed = detector.losses(images, [boxes[0], boxes[1][:0]], [labels[0], labels[1][:0]])
    assert all(loss.isfinite() for loss in mixed.values())


def test_focal_loss_and_iou_match_their_definitions():
    one = torch.tensor([[0.0, 0, 10, 10], [0, 0, 4, 4], [0, 0, 1, 1]])
    other = torch.tensor([[5.0, 5, 15, 15], [0, 0, 4, 4], [2, 2, 3, 3]])
    torch.testing.assert_close(paired_iou(one, other), box_iou(one, other).diagonal())
    logits, goal = torch.randn(20, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    p = logits.sigmoid()
    slow = sum(abs(y - q) ** 2 * -((1 - y) * torch.log(1 - q) + y * torch.log(q)) for y, q in zip(goal, p, strict=True))
    torch.testing.assert_close(quality_focal(logits, goal), slow)


def test_dense_detector_overfits_a_batch():
    torch.manual_seed(0)
    images, boxes, labels = batch(3)
    detector = learn(dense(), images, boxes, labels, 120)
    with torch.no_grad():
        for found, true, label in zip(detector(images), boxes, labels, strict=True):
            best = found["scores"] > 0.3
            overlap = box_iou(true, found["boxes"][best])
            assert (overlap.amax(1) > 0.5).all()
            assert (found["labels"][best][overlap.argmax(1)] == label).all()
