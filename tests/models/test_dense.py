"""The dense head against slow loops from the papers' rules."""

import math

import pytest
import torch
from torchvision.ops import box_iou, generalized_box_iou, nms

from tests.models.detectors import batch, dense, learn
from visionattn.models.dense import DenseHead, paired_iou, quality_focal
from visionattn.models.detector import detections

STRIDES = (8, 16, 32)


def maps(size=96, batch=2, channels=16):
    return [torch.randn(batch, channels, size // stride, size // stride) for stride in STRIDES]


def places():
    return [
        ((column + 0.5) * s, (row + 0.5) * s, s) for s in STRIDES for row in range(96 // s) for column in range(96 // s)
    ]


def assigned(boxes, radius=1.5):
    """Rule by rule, place by place."""
    reach = {8: (0, 64), 16: (64, 128), 32: (128, math.inf)}
    fits = {}
    for number, (x1, y1, x2, y2) in enumerate(boxes):
        inside = []
        for place, (x, y, s) in enumerate(places()):
            near = abs(x - (x1 + x2) / 2) < radius * s and abs(y - (y1 + y2) / 2) < radius * s
            sides = x - x1, y - y1, x2 - x, y2 - y
            if near and min(sides) > 0:
                low, high = reach[s]
                far = max(sides)
                octaves = max(0, math.log2(low / far) if low else 0, math.log2(far / high) if high < math.inf else 0)
                inside.append((octaves, place))
        best = min((octaves for octaves, _ in inside), default=0)
        fits[number] = {place for octaves, place in inside if octaves <= best + 1e-9}
    out = []
    for place in range(len(places())):
        those = [number for number in fits if place in fits[number]]
        area = {n: (boxes[n][2] - boxes[n][0]) * (boxes[n][3] - boxes[n][1]) for n in those}
        out.append(min(those, key=area.get) if those else -1)
    return out


BOXES = [
    [[10.0, 12, 40, 50], [15, 15, 30, 33], [2, 2, 95, 94]],
    [[50.0, 60, 53, 63], [0, 0, 90, 20], [0.0, 0, 96, 96]],
]


def test_places_are_assigned_by_the_rules():
    head = DenseHead(4, STRIDES, 16)
    found = head(maps())
    assert found.places.tolist() == [list(place) for place in places()]
    boxes = torch.tensor(BOXES)
    there = torch.ones(2, 3, dtype=torch.bool)
    there[1, 2] = False
    result = head.assign(found.places, boxes, there)
    assert result[0].tolist() == assigned(BOXES[0])
    assert result[1].tolist() == assigned(BOXES[1][:2])
    assert set(result[0].tolist()) == {-1, 0, 1, 2}


def test_losses_are_the_sums_of_the_equation():
    torch.manual_seed(0)
    head = DenseHead(4, STRIDES, 16)
    with torch.no_grad():
        head.classify.weight.mul_(30)
        found = head(maps())
    labels = [torch.tensor([1, 3, 0]), torch.tensor([2, 2])]
    boxes = [torch.tensor(BOXES[0]), torch.tensor(BOXES[1][:2])]
    losses = head.losses(found, boxes, labels)
    class_sum, box_sum, positives = 0.0, 0.0, 0
    for image in range(2):
        for place, number in enumerate(assigned(boxes[image].tolist())):
            goal = torch.zeros(4)
            if number >= 0:
                pair = found.boxes[image, place][None], boxes[image][number][None]
                goal[labels[image][number]] = box_iou(*pair)
                box_sum += 2 * (1 - float(generalized_box_iou(*pair)))
                positives += 1
            p = found.logits[image, place].sigmoid()
            bce = -(goal * p.log() + (1 - goal) * (1 - p).log())
            class_sum += float(((goal - p) ** 2 * bce).sum())
    assert float(losses["class"]) == pytest.approx(class_sum / positives, rel=1e-4)
    assert float(losses["box"]) == pytest.approx(box_sum / positives, rel=1e-4)


def test_boxes_reach_as_far_as_the_sides_say():
    head = DenseHead(2, (8,), 16)
    with torch.no_grad():
        head.regress.weight.zero_()
        head.regress.bias.copy_(torch.tensor([0.0, 0.5, 1.0, 1.5]))
        found = head([torch.randn(1, 16, 3, 4)])
    left, top, right, bottom = (8 * math.exp(value) for value in (0, 0.5, 1, 1.5))
    expected = [[x - left, y - top, x + right, y + bottom] for x, y, _ in found.places.tolist()]
    torch.testing.assert_close(found.boxes[0], torch.tensor(expected))


@pytest.mark.parametrize("make", [dense], ids=["dense"])
def test_images_without_boxes_teach_that_nothing_is_there(make):
    images, boxes, labels = batch(2)
    empty = [some[:0] for some in boxes], [some[:0] for some in labels]
    detector = make()
    losses = detector.losses(images, *empty)
    assert all(loss.isfinite() for loss in losses.values())
    sum(losses.values()).backward()
    assert detector.head.classify.bias.grad.gt(0).all()  # scores go down
    mixed = detector.losses(images, [boxes[0], boxes[1][:0]], [labels[0], labels[1][:0]])
    assert all(loss.isfinite() for loss in mixed.values())


def test_detections_are_those_of_a_slow_suppression():
    torch.manual_seed(0)
    scores = torch.rand(1, 60, 3) ** 3
    corner = torch.rand(1, 60, 2) * 60
    boxes = torch.cat([corner, corner + 5 + torch.rand(1, 60, 2) * 50], -1)
    (found,) = detections(scores, boxes, (70, 80), iou=0.5, lowest=0.1, most=20)
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


def test_small_parts_are_what_they_say():
    one = torch.tensor([[0.0, 0, 10, 10], [0, 0, 4, 4], [0, 0, 1, 1]])
    other = torch.tensor([[5.0, 5, 15, 15], [0, 0, 4, 4], [2, 2, 3, 3]])
    torch.testing.assert_close(paired_iou(one, other), box_iou(one, other).diagonal())
    logits, goal = torch.randn(20, dtype=torch.float64), torch.rand(20, dtype=torch.float64)
    p = logits.sigmoid()
    slow = sum(abs(y - q) ** 2 * -((1 - y) * torch.log(1 - q) + y * torch.log(q)) for y, q in zip(goal, p, strict=True))
    torch.testing.assert_close(quality_focal(logits, goal), slow)


def test_it_learns_what_it_is_shown():
    torch.manual_seed(0)
    images, boxes, labels = batch(3)
    detector = learn(dense(), images, boxes, labels, 120)
    with torch.no_grad():
        for found, true, label in zip(detector(images), boxes, labels, strict=True):
            best = found["scores"] > 0.3
            overlap = box_iou(true, found["boxes"][best])
            assert (overlap.amax(1) > 0.5).all()
            assert (found["labels"][best][overlap.argmax(1)] == label).all()
