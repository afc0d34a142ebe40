"""Test the dense head against slow loops written from its equations."""

import math

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou

from tests.models.detectors.small import batch, dense, learn
from visionattn.models.detectors.dense import DenseHead, paired_iou, quality_focal

STRIDES = (8, 16, 32)


def maps(size=96, batch=2, channels=16):
    return [torch.randn(batch, channels, size // stride, size // stride) for stride in STRIDES]


def cells():
    return [
        ((column + 0.5) * s, (row + 0.5) * s, s) for s in STRIDES for row in range(96 // s) for column in range(96 // s)
    ]


def assign_by_hand(logits, found, boxes, labels, radius=1.5, topk=10, beta=2.0):
    """Return {cell: (number of the box, target)} of an image, by the rules in the docstring of `DenseHead`."""
    candidates = {}
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        aligned = []
        for cell, (x, y, s) in enumerate(cells()):
            near = abs(x - (x1 + x2) / 2) < radius * s and abs(y - (y1 + y2) / 2) < radius * s
            if near and min(x - x1, y - y1, x2 - x, y2 - y) > 0:
                overlap = float(box_iou(found[cell][None], torch.tensor([[x1, y1, x2, y2]])))
                aligned.append((float(logits[cell, labels[number]].sigmoid()) * overlap**beta, overlap, cell))
        for aligned_with, overlap, cell in sorted(aligned, reverse=True)[:topk]:
            candidates.setdefault(cell, []).append((overlap, number, aligned_with))
    box_of_cell = {cell: max(of_box) for cell, of_box in candidates.items()}
    out = {}
    for number in range(len(boxes)):
        of_box = {cell: (t, overlap) for cell, (overlap, n, t) in box_of_cell.items() if n == number}
        for cell, (t, _) in of_box.items():
            best = max(t for t, _ in of_box.values()), max(overlap for _, overlap in of_box.values())
            out[cell] = number, t / best[0] * best[1]
    return out


BOXES = [[[10.0, 12, 40, 50], [15, 15, 30, 33], [2, 2, 95, 94]], [[50.0, 60, 53, 63], [0, 0, 90, 20], [0.0, 0, 96, 96]]]
LABELS = [torch.tensor([1, 3, 0]), torch.tensor([2, 2, 0])]


def head_and_predictions():
    """Return a head whose predictions differ from cell to cell, and its predictions for two images."""
    torch.manual_seed(0)
    head = DenseHead(4, STRIDES, 16)
    with torch.no_grad():
        head.classify.weight.mul_(30)
        head.regress.weight.mul_(10)
        return head, head(maps())


def test_cells_are_assigned_by_the_rules():
    head, found = head_and_predictions()
    assert found.places.tolist() == [list(cell) for cell in cells()]
    there = torch.ones(2, 3, dtype=torch.bool)
    there[1, 2] = False
    number, quality = head.assign(found, torch.tensor(BOXES), torch.stack(LABELS), there)
    for image, count in enumerate([3, 2]):
        slow = assign_by_hand(found.logits[image], found.boxes[image], BOXES[image][:count], LABELS[image])
        assert [slow.get(cell, (-1, 0))[0] for cell in range(len(cells()))] == number[image].tolist()
        assert [slow.get(cell, (-1, 0))[1] for cell in range(len(cells()))] == pytest.approx(quality[image].tolist())
    assert set(number[0].tolist()) == {-1, 0, 1, 2}
    assert (number[0] == 2).sum() == head.topk  # the box has 21 candidate cells


def test_losses_match_the_equation():
    head, found = head_and_predictions()
    boxes, labels = [torch.tensor(BOXES[0]), torch.tensor(BOXES[1][:2])], [LABELS[0], LABELS[1][:2]]
    losses = head.losses(found, boxes, labels)
    class_sum, box_sum, total = 0.0, 0.0, 0.0
    for image in range(2):
        chosen = assign_by_hand(found.logits[image], found.boxes[image], boxes[image].tolist(), labels[image])
        for cell in range(len(cells())):
            goal = torch.zeros(4)
            if cell in chosen:
                number, quality = chosen[cell]
                goal[labels[image][number]] = quality
                pair = found.boxes[image, cell][None], boxes[image][number][None]
                box_sum += 2 * quality * (1 - float(generalized_box_iou(*pair)))
                total += quality
            p = found.logits[image, cell].sigmoid()
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
    empty = [b[:0] for b in boxes], [n[:0] for n in labels]
    detector = make()
    losses = detector.losses(images, *empty)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert detector.head.classify.bias.grad.gt(0).all()  # a step against the gradient lowers all scores
    mixed = detector.losses(images, [boxes[0], boxes[1][:0]], [labels[0], labels[1][:0]])
    assert all(loss.isfinite() for loss in mixed.values())


def test_focal_loss_and_iou_match_their_definitions():
    first = torch.tensor([[0.0, 0, 10, 10], [0, 0, 4, 4], [0, 0, 1, 1]])
    second = torch.tensor([[5.0, 5, 15, 15], [0, 0, 4, 4], [2, 2, 3, 3]])
    torch.testing.assert_close(paired_iou(first, second), box_iou(first, second).diagonal())
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
