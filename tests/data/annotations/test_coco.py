"""Test the COCO layout: its variants that other tools write, and contradictory files."""

import json
from collections import Counter

import pytest

from tests.data.annotated import GAPS, coco
from tests.data.annotations.odd import boxes_of
from tests.refusals import refuses
from visionattn.data.annotations.checks import check
from visionattn.data.annotations.reading import read_annotations
from visionattn.errors import DataError


def change(root, function, split="train"):
    """Apply a function to the content of a split's annotation file."""
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


def ids_as_text(content):
    """Convert all ids to text."""
    for name, keys in {"images": ["id"], "categories": ["id"], "annotations": ["image_id", "category_id"]}.items():
        for entry in content[name]:
            entry |= {key: str(entry[key]) for key in keys}


def without_sizes(content):
    """Replace or remove the width or height of images, which are optional."""
    for number, image in enumerate(content["images"]):
        image["width"] = None if number % 2 else "?"
        if number == 2:
            del image["height"]


def two_ids_of_one_name(content):
    """Add a category without boxes that has the name of another; some exporters write such files."""
    content["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"})


@pytest.mark.parametrize("variant", [ids_as_text, without_sizes, two_ids_of_one_name])
def test_coco_files_of_other_tools_are_read(variant, tmp_path):
    expected = boxes_of(check(coco(tmp_path)))
    change(tmp_path, variant)
    report = check(tmp_path)
    assert not report.problems
    assert boxes_of(report) == expected
    assert read_annotations(tmp_path).category_ids == GAPS


@pytest.mark.parametrize(
    ("contradict", "message"),
    [
        (
            lambda c: c["images"][0].pop("id"),
            r"train2017\.json: image 'train_0\.png' needs a whole number as id, not None",
        ),
        (lambda c: c["images"][0].update(id="a7"), "not 'a7'"),
        (lambda c: c.update(images={"a": 1}), "images must be a list of objects"),
        (lambda c: c["annotations"].append(None), "annotations must be a list of objects"),
        (lambda c: c["categories"][0].pop("name"), r"category {'id': 3} needs a whole number as id, and a name"),
        (lambda c: c["categories"][0].update(name="dog"), r"val2017\.json names class 3 'cat', but another .* 'dog'"),
    ],
)
def test_contradictory_coco_files_raise(contradict, message, tmp_path):
    change(coco(tmp_path), contradict)
    refuses(DataError, message, check, tmp_path)


def test_images_that_share_an_id_are_left_out(tmp_path):
    change(coco(tmp_path), lambda content: content["images"][1].update(id=content["images"][0]["id"]))
    report = check(tmp_path)
    assert Counter(problem.kind for problem in report.problems) == {"shared id": 2, "unknown image": 1}
    assert [image.path.name for image in report.splits["train"]] == ["train_2.png", "train_3.png", "train_4.png"]
    assert any("shared id: images with the same id" in line for line in report.lines())


def test_category_ids_with_gaps_are_kept(tmp_path):
    found = read_annotations(coco(tmp_path))
    assert found.category_ids == GAPS
    chosen = read_annotations(tmp_path, class_names=["eel", "cat"])
    assert chosen.category_ids == (90, 3)
    assert Counter(problem.kind for problem in chosen.problems) == {"unknown class": 4}
    refuses(DataError, r"has no class 'cta'\. Nearest: cat", read_annotations, tmp_path, class_names=["cta"])


def test_panoptic_segments_are_refused_in_one_line_and_skipped_beside_boxes(tmp_path):
    root = coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    content["annotations"] = [{"image_id": 1, "file_name": "1.png", "segments_info": [{"bbox": [1, 2, 3, 4]}]}] * 400
    panoptic = root / "annotations" / "panoptic_train2017.json"
    panoptic.write_text(json.dumps(content))
    assert not check(root).problems
    with pytest.raises(
        DataError, match=r"panoptic_train2017\.json holds COCO's panoptic segments .* use a file of inst"
    ):
        check(panoptic)
