"""Test the detection metrics against pycocotools."""

import contextlib
import io

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.tasks.oracle import Oracle, Samples, sample, trainer
from visionattn.data.placement import Preprocess
from visionattn.tasks import Detection
from visionattn.tasks.coco_metrics import METRICS, compute_coco_metrics


def scene(random, count=40):
    """Make images of many sizes with boxes, crowds, and nearby detections, in pixels of the letterboxed input."""
    samples, answers, sources = [], [], []
    for number in range(count):
        size = (int(random.integers(60, 400)), int(random.integers(60, 400)))
        _, placement = Preprocess(64, fit="letterbox")(np.zeros((*size, 3), np.uint8))
        many = int(random.integers(0, 6))
        corner = random.uniform(0, 0.6, (many, 2)) * size[::-1]
        source = np.concatenate([corner, corner + random.uniform(0.05, 0.4, (many, 2)) * size[::-1]], 1)
        labels, crowd = random.integers(0, 3, many), random.random(many) < 0.15
        area = (source[:, 2:] - source[:, :2]).prod(1) * 0.7
        samples.append(
            sample(
                number,
                placement.boxes_to_input(source),
                labels,
                placement,
                crowd.tolist(),
                area.astype(np.float32).tolist(),
            )
        )
        guesses = np.concatenate(
            [source + random.normal(0, 4, source.shape), random.uniform(0, 1, (3, 4)).cumsum(1) * 20]
        )
        found = placement.boxes_to_input(guesses)
        sides = found[:, 2:] - found[:, :2]
        found = found[(sides > 0.5).all(1)]
        names = np.where(random.random(len(found)) < 0.8, np.resize(labels if many else [0], len(found)), 1)
        answers.append(
            {
                "boxes": torch.tensor(found, dtype=torch.float32),
                "scores": torch.tensor(random.random(len(found)), dtype=torch.float32),
                "labels": torch.tensor(names),
            }
        )
        sources.append((source, labels, crowd, area, placement.boxes_to_source(found)))
    return samples, answers, sources


def test_metrics_match_pycocotools_in_source_pixels():
    samples, answers, sources = scene(np.random.default_rng(0))
    truth, results = [], []
    for number, ((source, labels, crowd, area, found), answer) in enumerate(
        zip(sources, answers, strict=True), start=1
    ):
        for box, label, many, size in zip(source, labels, crowd, area, strict=True):
            xywh = [*box[:2], *(box[2:] - box[:2])]
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": xywh,
                    "area": size,
                    "iscrowd": int(many),
                }
            )
        for box, score, label in zip(found, answer["scores"].tolist(), answer["labels"].tolist(), strict=True):
            xywh = [*box[:2], *(box[2:] - box[:2])]
            results.append({"image_id": number, "category_id": label + 1, "bbox": xywh, "score": score})
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        images = [{"id": number + 1} for number in range(len(samples))]
        coco.dataset = {"images": images, "annotations": truth, "categories": [{"id": n + 1} for n in range(3)]}
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    task = Detection(Oracle(answers, num_classes=3))
    (found,) = trainer().test(task, datamodule=Samples(samples, "abc"), verbose=False)
    np.testing.assert_allclose([found[f"test/{name}"] for name in METRICS], evaluation.stats, atol=1e-5)
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for label, name in enumerate("abc"):
        assert found[f"test/map/{name}"] == pytest.approx(precision[:, :, label].mean(), abs=1e-5)
    assert 0.1 < found["test/map"] < 0.9


def test_metrics_are_zero_without_detections_and_minus_one_without_truth():
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    small = {"boxes": torch.tensor([[3.0, 4, 9, 9]]), "labels": torch.tensor([2])}
    scored = {
        name: {**some, "scores": torch.ones(len(some["labels"]))} for name, some in {"0": nothing, "1": small}.items()
    }
    figures, by_class = compute_coco_metrics([scored["0"]], [small])
    absent = {"map_medium", "map_large", "mar_medium", "mar_large"}
    assert figures == {name: -1 if name in absent else 0 for name in METRICS}
    assert by_class == {2: 0}
    assert compute_coco_metrics([scored["1"]], [nothing]) == (dict.fromkeys(METRICS, -1), {2: -1})
    assert compute_coco_metrics([], []) == (dict.fromkeys(METRICS, -1), {})
    figures, by_class = compute_coco_metrics([scored["1"]], [small])
    assert figures == {name: pytest.approx(-1 if name in absent else 1) for name in METRICS}
    assert by_class == {2: pytest.approx(1)}


def test_metrics_without_detections_and_truth_are_minus_one():
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    task = Detection(Oracle([empty, empty]))
    (found,) = trainer().test(task, datamodule=Samples([sample(0, [], []), sample(1, [], [])]), verbose=False)
    assert found["test/map"] == -1
