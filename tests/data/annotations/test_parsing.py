"""Test split files."""

import pytest

from tests.data.annotated import SCENES, voc, yolo
from visionattn.data.annotations.boxes import settle
from visionattn.data.annotations.checks import check, size_of
from visionattn.data.annotations.reading import read_annotations
from visionattn.errors import DataError, UsageError


def test_split_files_may_have_spaces_in_names_and_folders_before_names(tmp_path):
    root = voc(tmp_path / "voc")
    (root / "JPEGImages" / "train_0.png").rename(root / "JPEGImages" / "an eel é, 1.v2.png")
    (root / "Annotations" / "train_0.xml").rename(root / "Annotations" / "an eel é, 1.v2.xml")
    names = root / "ImageSets" / "Main" / "train.txt"
    names.write_text("an eel é, 1.v2\ntrain_1  1\ntrain_2 -1\ntrain_3\ntrain_4\n")
    report = check(root)
    assert not report.problems
    assert report.splits["train"][0].path.name == "an eel é, 1.v2.png"
    root = yolo(tmp_path / "yolo")
    for split, scenes in SCENES.items():
        for number in range(len(scenes)):
            for file in (
                root / "images" / split / f"{split}_{number}.png",
                root / "labels" / split / f"{split}_{number}.txt",
            ):
                if file.exists():
                    file.rename(file.with_stem(str(number)))
    (root / "a.txt").write_text("images/train/0.png\n./images/train/1.png\n")
    (root / "b.txt").write_text("images\\val\\0\n")
    report = check(root, splits={"train": str(root / "a.txt"), "valid": str(root / "b.txt")})
    assert not report.problems
    assert {split: [image.path.parent.name for image in images] for split, images in report.splits.items()} == {
        "train": ["train", "train"],
        "val": ["val"],
    }
    (root / "a.txt").write_text("0.png\n")
    with pytest.raises(DataError, match=r"a\.txt: 0\.png may be .*train/0\.png or .*val/0\.png; write the folder"):
        check(root, splits={"train": str(root / "a.txt")})
    with pytest.raises(UsageError, match=r"splits are train, val and test, not 'trian'\. Nearest: train"):
        check(root, splits={"trian": str(root / "a.txt")})


def test_split_files_replace_the_splits_of_the_layout(tmp_path):
    root = yolo(tmp_path)
    (tmp_path / "a.txt").write_text("images/train/train_1.png\nval_0\n")
    (tmp_path / "b.txt").write_text("train_2.png\nabsent.png\n")
    found = read_annotations(root, splits={"train": str(tmp_path / "a.txt"), "test": str(tmp_path / "b.txt")})
    splits = settle(found, size_of)
    names = {split: [image.path.name for image in images] for split, images in splits.items()}
    assert names == {"train": ["train_1.png", "val_0.png"], "test": ["train_2.png"]}
    assert [(problem.kind, problem.detail) for problem in found.problems] == [("not annotated", "absent.png")]
    with pytest.raises(DataError, match="no split file"):
        read_annotations(root, splits={"train": "nothing.txt"})
