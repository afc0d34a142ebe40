"""Test predictions of a detector: pycocotools evaluates the written file to the same mAP as the validation."""

import contextlib
import io
import json

import lightning as L
import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.data.annotated import SCENES, coco, yolo
from tests.tasks.oracle import Oracle
from visionattn.data import AnnotatedData, Preprocess
from visionattn.tasks import Detection
from visionattn.training.callbacks.predictions import WritePredictions

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


def noisy_detections(data):
    """Return two noisy boxes per true box, in input pixels; the last label of each image is wrong."""
    random = np.random.default_rng(0)
    detections = []
    for sample in data.dataset("val"):
        boxes = torch.cat([sample["boxes"], sample["boxes"]]) + torch.from_numpy(
            random.normal(0, 1.5, (2 * len(sample["boxes"]), 4))
        )
        labels = torch.cat([sample["labels"], sample["labels"]])
        labels[-1] = (labels[-1] + 1) % 3
        detections.append(
            {
                "boxes": boxes.float().clamp(0, 48),
                "scores": torch.from_numpy(random.random(len(boxes))).float(),
                "labels": labels,
            }
        )
    return detections


@pytest.mark.parametrize("layout", [coco, yolo])
def test_written_predictions_have_the_mean_average_precision_of_the_validation(layout, tmp_path):
    data = AnnotatedData(str(layout(tmp_path / "data")), num_workers=0, preprocess=Preprocess(48, fit="letterbox"))
    detections = noisy_detections(data)
    trainer = L.Trainer(
        **QUIET, enable_checkpointing=False, default_root_dir=tmp_path / "run", callbacks=[WritePredictions()]
    )
    (metrics,) = trainer.validate(Detection(Oracle(detections, num_classes=3)), datamodule=data, verbose=False)
    trainer.predict(Detection(Oracle(detections, num_classes=3)), datamodule=data)
    results = json.loads((tmp_path / "run" / "predictions.json").read_text())
    assert {result["file_name"] for result in results} == {f"val_{number}.png" for number in range(len(SCENES["val"]))}
    pictures = sorted(path.name.partition("_")[2] for path in (tmp_path / "run" / "predictions").iterdir())
    assert pictures == ["val_0.jpg", "val_1.jpg"]
    if layout is not coco:  # only COCO's layout has a file that pycocotools can read
        return
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "data" / "annotations" / "instances_val2017.json"))
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    assert 0.1 < evaluation.stats[0] < 0.9
    of_validation = [metrics[f"val/{name}"] for name in ("map", "map_50", "map_75")]
    np.testing.assert_allclose(of_validation, evaluation.stats[:3], atol=1e-3)
