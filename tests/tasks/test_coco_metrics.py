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


def make_images(random, count=40):
    """Make samples with objects and crowds, predictions near the objects, and both in pixels of the source images."""
    samples, predictions, sources = [], [], []
    for number in range(count):
        size = (int(random.integers(60, 400)), int(random.integers(60, 400)))
        _, placement = Preprocess(64, fit="letterbox")(np.zeros((*size, 3), np.uint8))
        num_objects = int(random.integers(0, 6))
        corner = random.uniform(0, 0.6, (num_objects, 2)) * size[::-1]
        source = np.concatenate([corner, corner + random.uniform(0.05, 0.4, (num_objects, 2)) * size[::-1]], 1)
        labels, crowd = random.integers(0, 3, num_objects), random.random(num_objects) < 0.15
        area = (source[:, 2:] - source[:, :2]).prod(1) * 0.7  # an object covers 70 % of its box
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
        true_labels = np.resize(labels if num_objects else [0], len(found))
        predicted_labels = np.where(random.random(len(found)) < 0.8, true_labels, 1)
        predictions.append(
            {
                "boxes": torch.tensor(found, dtype=torch.float32),
                "scores": torch.tensor(random.random(len(found)), dtype=torch.float32),
                "labels": torch.tensor(predicted_labels),
            }
        )
        sources.append((source, labels, crowd, area, placement.boxes_to_source(found)))
    return samples, predictions, sources


def test_metrics_match_pycocotools_in_source_pixels():
    samples, predictions, sources = make_images(np.random.default_rng(0))
    truth, results = [], []
    for number, ((source, labels, crowd, area, found), prediction) in enumerate(
        zip(sources, predictions, strict=True), start=1
    ):
        for box, label, is_crowd, box_area in zip(source, labels, crowd, area, strict=True):
            xywh = [*box[:2], *(box[2:] - box[:2])]
            truth.append(
                {
                    "id": len(truth) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": xywh,
                    "area": box_area,
                    "iscrowd": int(is_crowd),
                }
            )
        for box, score, label in zip(found, prediction["scores"].tolist(), prediction["labels"].tolist(), strict=True):
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
    task = Detection(Oracle(predictions, num_classes=3))
    (metrics,) = trainer().test(task, datamodule=Samples(samples, "abc"), verbose=False)
    np.testing.assert_allclose([metrics[f"test/{name}"] for name in METRICS], evaluation.stats, atol=1e-5)
    precision = evaluation.eval["precision"][:, :, :, 0, 2]
    for label, name in enumerate("abc"):
        assert metrics[f"test/map/{name}"] == pytest.approx(precision[:, :, label].mean(), abs=1e-5)
    assert 0.1 < metrics["test/map"] < 0.9


def test_metrics_are_zero_without_detections_and_minus_one_without_truth():
    no_objects = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.long)}
    small_object = {"boxes": torch.tensor([[3.0, 4, 9, 9]]), "labels": torch.tensor([2])}
    no_detections, perfect_detection = (
        {**objects, "scores": torch.ones(len(objects["labels"]))} for objects in (no_objects, small_object)
    )
    metrics, by_class = compute_coco_metrics([no_detections], [small_object])
    metrics_without_objects = {"map_medium", "map_large", "mar_medium", "mar_large"}
    assert metrics == {name: -1 if name in metrics_without_objects else 0 for name in METRICS}
    assert by_class == {2: 0}
    assert compute_coco_metrics([perfect_detection], [no_objects]) == (dict.fromkeys(METRICS, -1), {2: -1})
    assert compute_coco_metrics([], []) == (dict.fromkeys(METRICS, -1), {})
    metrics, by_class = compute_coco_metrics([perfect_detection], [small_object])
    assert metrics == {name: pytest.approx(-1 if name in metrics_without_objects else 1) for name in METRICS}
    assert by_class == {2: pytest.approx(1)}


def test_metrics_without_detections_and_truth_are_minus_one():
    empty = {"boxes": torch.zeros(0, 4), "scores": torch.zeros(0), "labels": torch.zeros(0, dtype=torch.long)}
    task = Detection(Oracle([empty, empty]))
    (metrics,) = trainer().test(task, datamodule=Samples([sample(0, [], []), sample(1, [], [])]), verbose=False)
    assert metrics["test/map"] == -1
