"""Test the COCO layout, also as other tools write it, and contradictory files."""

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
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


def texts(content):
    """Write numbers as text."""
    for name, keys in {"images": ["id"], "categories": ["id"], "annotations": ["image_id", "category_id"]}.items():
        for one in content[name]:
            one |= {key: str(one[key]) for key in keys}


def without_sizes(content):
    for number, image in enumerate(content["images"]):
        image["width"] = None if number % 2 else "?"
        if number == 2:
            del image["height"]


def twice_named(content):
    """Name the data set as a first class without boxes, as some exporters do."""
    content["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"})


@pytest.mark.parametrize("odd", [texts, without_sizes, twice_named])
def test_coco_files_of_other_tools_are_read(odd, tmp_path):
    expected = boxes_of(check(coco(tmp_path)))
    change(tmp_path, odd)
    report = check(tmp_path)
    assert not report.problems
    assert boxes_of(report) == expected
    assert read_annotations(tmp_path).category_ids == GAPS


@pytest.mark.parametrize(
    ("odd", "told"),
    [
        (
            lambda c: c["images"][0].pop("id"),
            r"train2017\.json: image 'train_0\.png' needs a whole number as id, not None",
        ),
        (lambda c: c["images"][0].update(id="a7"), "not 'a7'"),
        (lambda c: c.update(images={"a": 1}), "images must be a list of objects"),
        (lambda c: c["annotations"].append(None), "annotations must be a list of objects"),
        (lambda c: c["categories"][0].pop("name"), r"category {'id': 3} needs a whole number as id, and a name"),
        (lambda c: c["categories"][0].update(name="dog"), r"val2017\.json calls class 3 'cat', and another .* 'dog'"),
    ],
)
def test_contradictory_coco_files_raise(odd, told, tmp_path):
    change(coco(tmp_path), odd)
    refuses(DataError, told, check, tmp_path)


def test_images_that_share_an_id_are_left_out(tmp_path):
    change(coco(tmp_path), lambda content: content["images"][1].update(id=content["images"][0]["id"]))
    report = check(tmp_path)
    assert Counter(problem.kind for problem in report.problems) == {"shared id": 2, "unknown image": 1}
    assert [image.path.name for image in report.splits["train"]] == ["train_2.png", "train_3.png", "train_4.png"]
    assert any("shared id: images with the same id" in line for line in report.lines())


def test_ids_with_gaps_are_kept(tmp_path):
    found = read_annotations(coco(tmp_path))
    assert found.category_ids == GAPS
    chosen = read_annotations(tmp_path, class_names=["eel", "cat"])
    assert chosen.category_ids == (90, 3)
    assert Counter(problem.kind for problem in chosen.problems) == {"unknown class": 4}
    refuses(DataError, r"has no class 'cta'\. Nearest: cat", read_annotations, tmp_path, class_names=["cta"])
