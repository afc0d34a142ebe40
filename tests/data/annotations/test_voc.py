"""Test the Pascal VOC layout."""

from collections import Counter

import pytest

from tests.data.annotated import voc
from tests.data.annotations.odd import data
from visionattn.data.annotations.checks import check


def test_object_without_a_name_and_file_in_an_unknown_encoding_are_reported(tmp_path):
    root = voc(tmp_path)
    file = root / "Annotations" / "train_0.xml"
    file.write_text(file.read_text().replace("<name>cat</name>", ""))
    (root / "Annotations" / "train_1.xml").write_text("<?xml version='1.0' encoding='foo'?><annotation/>")
    report = check(root)
    assert report.class_names == ("cat", "dog", "eel")
    kinds = Counter(problem.kind for problem in report.problems)
    assert kinds == {"unknown class": 1, "unreadable annotation": 1, "not annotated": 1}


def test_trainval_is_the_train_split_if_there_is_no_train_or_val(tmp_path):
    root = voc(tmp_path)
    lists = root / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").rename(lists / "test.txt")
    assert {split: len(images) for split, images in data(root)._images.items()} == {"train": 4, "val": 1, "test": 2}


@pytest.mark.parametrize(
    "named",
    [
        "<folder>photos</folder>",
        "<folder>../elsewhere</folder>",
        "<path>C:\\Users\\me\\photos\\{name}</path>",
        "<path>/home/me/photos/{name}</path>",
        "<path>{root}/photos/{name}</path>",
    ],
)
def test_images_are_found_where_folder_or_path_says(named, tmp_path):
    root = voc(tmp_path / "voc")
    (root / "JPEGImages").rename(root.parent / "elsewhere" if "elsewhere" in named else root / "photos")
    for file in (root / "Annotations").iterdir():
        element = named.format(name=f"{file.stem}.png", root=root)
        file.write_text(file.read_text().replace("<annotation>", f"<annotation>{element}"))
    report = check(root)
    assert not report.problems
    assert sum(map(len, report.splits.values())) == 7
