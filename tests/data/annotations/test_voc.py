"""Test the Pascal VOC layout."""

from collections import Counter

from tests.data.annotated import voc
from tests.data.annotations.odd import data
from visionattn.data.annotations.checks import check


def test_object_without_a_name_has_an_unknown_class(tmp_path):
    root = voc(tmp_path)
    file = root / "Annotations" / "train_0.xml"
    file.write_text(file.read_text().replace("<name>cat</name>", ""))
    (root / "Annotations" / "train_1.xml").write_text("<?xml version='1.0' encoding='foo'?><annotation/>")
    report = check(root)
    assert report.class_names == ("cat", "dog", "eel")
    kinds = Counter(problem.kind for problem in report.problems)
    assert kinds == {"unknown class": 1, "unreadable annotation": 1, "not annotated": 1}


def test_trainval_is_the_train_split_if_there_is_no_train(tmp_path):
    root = voc(tmp_path)
    lists = root / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").rename(lists / "test.txt")
    assert {split: len(images) for split, images in data(root)._images.items()} == {"train": 4, "val": 1, "test": 2}
