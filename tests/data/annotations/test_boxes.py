"""Test that boxes read in the wrong format are detected."""

import json

import numpy as np
import pytest

from tests.data.annotated import coco, voc, yolo
from visionattn.data.annotations.checks import check


@pytest.mark.parametrize("wrong", ["xyxy", "cxcywh"])
def test_wrong_box_format_is_reported_with_the_right_one(wrong, tmp_path):
    """Write 60 boxes in a format that COCO does not use. Fewer boxes could fit COCO's format by chance."""
    root = coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    random = np.random.default_rng(0)
    content["annotations"] = []
    for number in range(60):
        x1, y1 = random.uniform(0, 50), random.uniform(0, 30)
        x2, y2 = random.uniform(x1 + 5, 80), random.uniform(y1 + 5, 60)
        box = [x1, y1, x2, y2] if wrong == "xyxy" else [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
        content["annotations"].append({"id": number, "image_id": 1, "category_id": 3, "bbox": box})
    file.write_text(json.dumps(content))
    problems = check(root).problems
    assert f"fit {wrong}; set box_format: {wrong}" in next(p.detail for p in problems if p.kind == "wrong format")
    assert not [p for p in check(root, box_format=wrong).problems if p.kind == "wrong format"]


def test_fractions_read_as_pixels_and_pixels_read_as_fractions_are_reported(tmp_path):
    root = voc(tmp_path / "voc")
    for file in (root / "Annotations").glob("*.xml"):
        text = file.read_text()
        for number in range(80, 0, -1):
            text = text.replace(f">{number}</x", f">{number / 80}</x").replace(f">{number}</y", f">{number / 60}</y")
        file.write_text(text)
    assert any("look like fractions" in problem.detail for problem in check(root).problems)
    root = yolo(tmp_path / "yolo")
    for file in (root / "labels" / "train").glob("*.txt"):
        file.write_text("0 40 30 20 10\n1 20 20 10 10\n0 30 30 9 9\n")
    assert any("look like pixels" in problem.detail for problem in check(root).problems)
