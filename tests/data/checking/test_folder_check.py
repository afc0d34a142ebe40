"""Test the check of a folder with a sub-folder of images for each class."""

import pytest

from tests.data.annotated import picture
from visionattn.cli import main
from visionattn.data.checking.folder_check import check_folder, has_classes
from visionattn.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for number, place in enumerate(("train/cat/0", "train/cat/1", "train/dog/2", "valid/cat/3", "valid/dog/4")):
        picture(tmp_path / f"{place}.png", number)
    return tmp_path


def test_damaged_duplicate_and_missing_images_are_reported(folder, capsys):
    assert has_classes(folder)
    assert not check_folder(folder).problems
    cut = folder / "train" / "dog" / "cut.png"
    cut.write_bytes((folder / "train" / "dog" / "2.png").read_bytes()[:3000])
    (folder / "train" / "cat" / "twin.png").write_bytes((folder / "train" / "cat" / "0.png").read_bytes())
    (folder / "valid" / "dog" / "leak.png").write_bytes((folder / "train" / "dog" / "2.png").read_bytes())
    picture(folder / "train" / "eel" / "5.png", 5)
    assert main(["data", "check", str(folder)]) == 1
    printed = capsys.readouterr().out
    for line in (
        "folder, 3 classes: cat, dog, eel",
        "  train  5 images: cat 3, dog 1, eel 1",
        "  valid  3 images: cat 1, dog 2, eel 0",
        "4 problems",
        f"      train/dog/cut.png: {cut}: cut short",
        f"{folder}/train/cat/twin.png: has the same content as 0.png",
        f"{folder}/valid/dog/leak.png: in valid, and as 2.png in train",
        f"      eel: in {folder}/valid",
    ):
        assert line in printed


def test_class_folders_without_splits_are_one_split(folder):
    report = check_folder(folder / "train")
    assert [(split, len(images)) for split, images in report.splits.items()] == [("", 3)]
    assert report.lines() == ["folder, 2 classes: cat, dog", "  all    3 images: cat 2, dog 1", "no problems"]
    (folder / "train" / "eel").mkdir()
    with pytest.raises(DataError, match="the class 'eel' is empty"):
        check_folder(folder / "train")


def test_folder_without_images_is_refused(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert not has_classes(tmp_path)
    assert not has_classes(tmp_path / "gone")
    assert main(["data", "check", str(tmp_path)]) == 1
    assert "holds no annotations" in capsys.readouterr().err


def test_a_json_file_without_boxes_beside_class_folders_is_no_annotation(folder, capsys):
    (folder / "notes.json").write_text('{"camera": "old"}')
    assert has_classes(folder)
    assert main(["data", "check", str(folder)]) == 0
    assert "folder, 2 classes: cat, dog" in capsys.readouterr().out
    (folder / "instances_train.json").write_text('{"images": [], "annotations": [], "categories": []}')
    assert not has_classes(folder)


def test_splits_have_the_names_that_a_training_accepts(tmp_path):
    for number, place in enumerate(("Training/cat/0", "Training/dog/1", "validation/cat/2", "validation/dog/3")):
        picture(tmp_path / f"{place}.png", number)
    report = check_folder(tmp_path)
    assert (report.class_names, set(report.splits)) == (("cat", "dog"), {"Training", "validation"})
    with pytest.raises(DataError, match="there is no folder"):
        check_folder(tmp_path / "nothing")
