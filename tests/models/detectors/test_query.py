"""Test the parts of the query detector against slow loops, and that noised queries do not affect other queries."""

import itertools
import math

import pytest
import torch
from torchvision.ops import box_convert, box_iou, generalized_box_iou

from tests.models.detectors.small import batch, learn, query
from visionattn.models.detectors.decoder import Answer
from visionattn.models.detectors.dense import DensePredictions
from visionattn.models.detectors.query import QueryDetector, make_noise, match, set_losses

TRUTH = [torch.tensor([[0.3, 0.3, 0.2, 0.4], [0.7, 0.6, 0.3, 0.2], [0.5, 0.5, 0.9, 0.9]]), torch.zeros(0, 4)]
LABELS = [torch.tensor([2, 0, 1]), torch.zeros(0, dtype=torch.long)]


def answer(queries=5, batch=2):
    generator = torch.Generator().manual_seed(0)
    boxes = 0.2 + 0.6 * torch.rand(batch, queries, 4, generator=generator)
    return Answer(torch.randn(batch, queries, 3, generator=generator), boxes)


def test_matching_has_the_lowest_cost_of_all_pairings():
    found = answer()
    (queries, items), (none, _) = match(found, TRUTH, LABELS)
    assert len(none) == 0

    def cost(q, n):
        p = float(found.logits[0, q, LABELS[0][n]].sigmoid())
        classes = -0.25 * (1 - p) ** 2 * math.log(p) + 0.75 * p**2 * math.log(1 - p)
        boxes = float((found.boxes[0, q] - TRUTH[0][n]).abs().sum())
        pair = (box_convert(box[None], "cxcywh", "xyxy") for box in (found.boxes[0, q], TRUTH[0][n]))
        return 2 * classes + 5 * boxes - 2 * float(generalized_box_iou(*pair))

    pairings = itertools.permutations(range(5), 3)  # the query of each of the three objects
    best = min(pairings, key=lambda pairing: sum(cost(q, n) for n, q in enumerate(pairing)))
    assert dict(zip(items.tolist(), queries.tolist(), strict=True)) == dict(enumerate(best))


def test_losses_match_the_equation():
    found = answer()
    pairs = [(torch.tensor([4, 0, 2]), torch.tensor([0, 1, 2])), (torch.zeros(0, dtype=torch.long),) * 2]
    losses = set_losses(found, pairs, TRUTH, LABELS)
    goal = torch.zeros(2, 5, 3)
    box = overlap = 0.0
    for q, n in ((4, 0), (0, 1), (2, 2)):
        pair = [box_convert(box_4[None], "cxcywh", "xyxy") for box_4 in (found.boxes[0, q], TRUTH[0][n])]
        goal[0, q, LABELS[0][n]] = box_iou(*pair)
        box += 5 * float((found.boxes[0, q] - TRUTH[0][n]).abs().sum()) / 3
        overlap += 2 * (1 - float(generalized_box_iou(*pair))) / 3
    p = found.logits.sigmoid()
    classes = ((goal - p) ** 2 * -(goal * p.log() + (1 - goal) * (1 - p).log())).sum() / 3
    assert float(losses["class"]) == pytest.approx(float(classes), rel=1e-4)
    assert float(losses["box"]) == pytest.approx(box, rel=1e-4)
    assert float(losses["overlap"]) == pytest.approx(overlap, rel=1e-4)


def test_noise_has_the_documented_size():
    torch.manual_seed(0)
    noise = make_noise(TRUTH, LABELS, 600, 3)
    assert noise.group == 6
    groups = noise.boxes.shape[1] // 6
    assert groups == 100
    corners = box_convert(noise.boxes[0], "cxcywh", "xyxy").view(groups, 2, 3, 4)
    true = box_convert(TRUTH[0], "cxcywh", "xyxy")
    moved = (corners - true).abs() / (TRUTH[0][:, 2:] / 2).repeat(1, 2)
    cut = (corners <= 0) | (corners >= 1)  # boxes are clipped at the image's edge
    assert (moved[:, 0] <= 0.4 + 1e-5).all()
    assert ((moved[:, 1] >= 0.4 - 1e-5) | cut[:, 1]).all()
    assert (moved[:, 1] <= 0.8 + 1e-5).all()
    kept = noise.labels[0].view(groups, 2, 3) == LABELS[0]
    assert 0.75 < kept.float().mean() < 0.92  # expected 1 − 1/4 · 2/3: a third of the redrawn quarter keeps its label
    queries, items = noise.pairs[0]
    assert queries.tolist() == [6 * group + number for group in range(groups) for number in range(3)]
    assert items.tolist() == [0, 1, 2] * groups
    assert len(noise.pairs[1][0]) == 0
    assert make_noise(TRUTH[1:], LABELS[1:], 10, 3) is None


def test_noised_queries_do_not_affect_other_queries():
    torch.manual_seed(0)
    detector = query().eval()
    images, boxes, labels = batch(2)
    size = images.shape[2], images.shape[3]
    with torch.no_grad():
        for layer in detector.decoder.layers:  # so that sampling points and weights depend on the queries
            torch.nn.init.normal_(layer.look.offsets.weight, std=0.1)
            torch.nn.init.normal_(layer.look.weigh.weight)
        maps = detector.features(images)
        queries, anchors = detector.select(maps, detector.dense(maps), size)
        truth = [box_convert(boxes_N4, "xyxy", "cxcywh") / size[0] for boxes_N4 in boxes]
        noise = make_noise(truth, labels, 40, 4)
        alone = detector.decoder(queries, anchors, maps)[-1]
        hidden = noise.hidden(noise.boxes.shape[1] + queries.shape[1])
        all_queries = torch.cat([detector.label(noise.labels), queries], 1)
        all_anchors = torch.cat([noise.boxes, anchors], 1)
        with_noise = detector.decoder(all_queries, all_anchors, maps, hidden)[-1]
        count = noise.boxes.shape[1]
        torch.testing.assert_close(with_noise.logits[:, count:], alone.logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(with_noise.boxes[:, count:], alone.boxes, atol=1e-5, rtol=1e-5)
        changed_anchors = all_anchors.clone()
        changed_anchors[:, : noise.group] += 0.05  # a change of the first group must not affect other queries
        changed = detector.decoder(all_queries, changed_anchors, maps, hidden)[-1]
    assert count >= 2 * noise.group
    torch.testing.assert_close(changed.boxes[:, noise.group : count], with_noise.boxes[:, noise.group : count])
    assert not torch.allclose(changed.boxes[:, : noise.group], with_noise.boxes[:, : noise.group])


@pytest.mark.parametrize("duplicates", [True, False], ids=["duplicates", "distinct boxes"])
def test_best_cells_become_queries_with_duplicates_ranked_last(duplicates):
    torch.manual_seed(0)
    detector = query().eval()
    images, *_ = batch(2)
    if duplicates:  # with wide boxes, most cells propose nearly the same box
        torch.nn.init.constant_(detector.dense.regress.bias, 2.5)
    with torch.no_grad():
        maps = detector.features(images)
        found = detector.dense(maps)
        queries, anchors = detector.select(maps, found, (64, 64))
    for n in range(2):
        distinct, others = [], []
        for place in found.logits[n].amax(1).argsort(descending=True).tolist():
            overlap = box_iou(found.boxes[n, place][None], found.boxes[n, distinct])
            (others if (overlap > 0.7).any() else distinct).append(place)
        assert (len(distinct) < 20) == duplicates
        order = (distinct + others)[:20]
        expected = box_convert(found.boxes[n, order], "xyxy", "cxcywh") / 64
        torch.testing.assert_close(anchors[n], expected.clamp(0, 1))
        tokens = torch.cat([x.flatten(2) for x in maps], 2)[n].T
        torch.testing.assert_close(queries[n], detector.start(tokens[order]))


def test_boxes_of_different_images_do_not_suppress_each_other():
    detector = query().eval()
    detector.queries = 1
    maps = [torch.randn(2, detector.features.channels, 1, 2)]
    # batched_nms offsets the boxes of the second image by the largest coordinate plus one. With negative coordinates,
    # the offset would move the second image's first box onto the first image's first box.
    boxes = torch.tensor([[[0.0, 0, 99, 99], [50, 50, 60, 60]], [[-100, -100, -1, -1], [10, 10, 20, 20]]])
    logits = torch.tensor([[3.0, 0], [2, 1]])[..., None].expand(2, 2, 4)
    _, anchors = detector.select(maps, DensePredictions(logits, boxes, torch.zeros(2, 3)), (100, 100))
    torch.testing.assert_close(anchors[:, 0], torch.tensor([[0.495, 0.495, 0.99, 0.99], [0, 0, 0.99, 0.99]]))


def test_best_hundred_predictions_are_returned_without_suppression():
    torch.manual_seed(0)
    detector = query().eval()
    torch.nn.init.normal_(detector.decoder.classify[-1].weight)
    images, *_ = batch(1)
    answers = []
    detector.decoder.register_forward_hook(lambda _, args, out: answers.append(out[-1]))
    with torch.no_grad():
        (found,) = detector(torch.cat([images] * 2, 2))
        (wide,) = QueryDetector(detector.features, 30, queries=20, layers=1, hidden=16).eval()(images)
    scores = answers[0].logits[0].sigmoid().flatten()
    best = scores.argsort(descending=True)[: int((scores >= 0.01).sum())]
    torch.testing.assert_close(found["scores"], scores[best])
    assert found["index"].tolist() == (best // 4).tolist()
    assert found["labels"].tolist() == (best % 4).tolist()
    corners = box_convert(answers[0].boxes[0, best // 4], "cxcywh", "xyxy") * torch.tensor([64, 128, 64, 128])
    torch.testing.assert_close(found["boxes"], corners.clamp(min=0).minimum(torch.tensor([64.0, 128, 64, 128])))
    assert len(wide["scores"]) == 100  # of 600 predictions


def test_images_without_boxes_give_losses():
    images, boxes, labels = batch(2)
    detector = query()
    for boxes_and_labels in (
        ([boxes[0], boxes[1][:0]], [labels[0], labels[1][:0]]),
        ([b[:0] for b in boxes], [b[:0] for b in labels]),
    ):
        losses = detector.losses(images, *boxes_and_labels)
        assert all(loss.isfinite() for loss in losses.values())
        sum(losses.values()).backward()
    assert {"dense_class", "dense_box", "class", "box", "overlap"} <= losses.keys()


def test_query_detector_overfits_a_batch():
    torch.manual_seed(0)
    images, boxes, labels = batch(2)
    detector = learn(query(), images, boxes, labels, 150, lr=2e-3)
    correct = []
    with torch.no_grad():
        for found, true, label in zip(detector(images), boxes, labels, strict=True):
            best = found["scores"] > 0.3
            overlap, place = box_iou(true, found["boxes"][best]).max(1)
            correct += ((overlap > 0.5) & (found["labels"][best][place] == label)).tolist()
            assert int(best.sum()) <= len(true) + 1  # almost no duplicates, although nothing is suppressed
    assert sum(correct) >= 0.8 * len(correct)
