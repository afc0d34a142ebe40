"""Test that the three layouts of the same images give the same annotations."""

import shutil

import numpy as np
import pytest

from tests.data.annotated import LAYOUTS, NAMES, SCENES, coco, voc, yolo
from tests.refusals import refuses
from visionattn.data.annotations.checks import check
from visionattn.data.annotations.reading import layout_of, read_annotations
from visionattn.errors import DataError


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_boxes(layout, tmp_path):
    root = LAYOUTS[layout](tmp_path)
    assert layout_of(root) == layout
    report = check(root)
    assert report.problems == []
    assert report.class_names == NAMES
    for split, scenes in SCENES.items():
        assert len(report.splits[split]) == len(scenes)
        for image, scene in zip(report.splits[split], scenes, strict=True):
            assert image.size == (60, 80)
            np.testing.assert_array_equal(image.labels, [row[0] for row in scene])
            np.testing.assert_allclose(image.boxes, np.array([row[1:] for row in scene]).reshape(-1, 4), atol=1e-4)
            areas = (image.boxes[:, 2:] - image.boxes[:, :2]).prod(1)
            np.testing.assert_allclose(image.area, areas / 2 if layout == "coco" else areas, rtol=1e-4)


def test_folder_without_annotations_raises(tmp_path):
    refuses(DataError, "holds no annotations", read_annotations, tmp_path)
    (tmp_path / "x.json").write_text("[1]")
    refuses(DataError, r"no \.json is in COCO's layout", read_annotations, tmp_path)


def yolo_in_capitals(root):
    yolo(root)
    for folder in ("images", "labels"):
        (root / folder / "train").rename(root / folder / "Training")
        (root / folder / "val").rename(root / folder / "VAL")
    (root / "data.yaml").write_text("names: [cat, dog, eel]")


def coco_in_capitals(root):
    coco(root)
    for split, name in (("train", "Train"), ("val", "Validation")):
        (root / f"{split}2017").rename(root / name)
        (root / "annotations" / f"instances_{split}2017.json").rename(root / name / "_annotations.coco.json")


def voc_in_capitals(root):
    voc(root / "all")
    for split, name in (("train", "TRAIN"), ("val", "Valid")):
        for folder in ("Annotations", "JPEGImages"):
            (root / name / folder).mkdir(parents=True)
            for file in (root / "all" / folder).glob(f"{split}_*"):
                file.rename(root / name / folder / file.name)
    shutil.rmtree(root / "all")


@pytest.mark.parametrize("write", [coco_in_capitals, voc_in_capitals, yolo_in_capitals])
def test_names_of_split_folders_may_have_capitals(write, tmp_path):
    write(tmp_path)
    report = check(tmp_path)
    assert report.problems == []
    counts = {split: len(images) for split, images in report.splits.items() if images}
    assert counts == {split: len(scenes) for split, scenes in SCENES.items()}
