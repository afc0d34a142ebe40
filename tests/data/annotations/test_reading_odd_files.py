"""Test folders that differ from the plain layouts: other tools' files, missing images, missing annotations."""

import shutil

import albumentations as A
import pytest

from tests.data.annotated import LAYOUTS, coco, picture, voc, yolo
from tests.data.annotations.odd import boxes_of, data
from tests.refusals import refuses
from visionattn.data.annotations.checks import check
from visionattn.data.annotations.reading import layout_of
from visionattn.data.transforms import Augmentation
from visionattn.errors import DataError


@pytest.mark.parametrize("layout", LAYOUTS)
def test_upper_case_suffixes_byte_order_marks_and_hidden_files_change_nothing(layout, tmp_path):
    expected = boxes_of(check(LAYOUTS[layout](tmp_path / "plain")))
    root = LAYOUTS[layout](tmp_path / "odd")
    for file in [file for file in root.rglob("*") if file.is_file()]:
        if file.suffix == ".txt" or file.suffix == ".json":
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        if file.parent.name != "Main" and not (layout == "coco" and file.suffix == ".png"):
            file.rename(file.with_suffix(file.suffix.upper()) if file.suffix != ".yaml" else file.with_suffix(".YAML"))
        (file.parent / f"._{file.name}").write_bytes(b"macOS leaves such files on other file systems")
    report = check(root)
    assert not report.problems
    assert boxes_of(report) == expected


@pytest.mark.parametrize("layout", ["voc", "yolo"])
def test_json_file_without_annotations_does_not_make_a_folder_coco(layout, tmp_path):
    root = LAYOUTS[layout](tmp_path)
    (root / "package.json").write_text('{"name": "mine"}')
    assert layout_of(root) == layout
    assert not check(root).problems


def test_annotation_folder_with_two_names_is_read_once(tmp_path):
    """A link stands for a file system that ignores case."""
    root = voc(tmp_path)
    (root / "annotations").symlink_to(root / "Annotations")
    assert not check(root).problems


@pytest.mark.parametrize("layout", LAYOUTS)
def test_roboflow_layouts_are_read(layout, tmp_path):
    """Roboflow writes train/ and valid/ with images and annotations, and a .yaml with ../ in its paths."""
    expected = boxes_of(check(LAYOUTS[layout](tmp_path / "plain")))
    root = LAYOUTS[layout](tmp_path / "odd")
    for split, name in (("train", "train"), ("val", "valid")):
        (root / name).mkdir()
        if layout == "yolo":
            for part in ("images", "labels"):
                (root / part / split).rename(root / name / part)
            continue
        for file in [*root.rglob(f"{split}_*.png"), *root.rglob(f"{split}_*.xml")]:
            file.rename(root / name / file.name)
        for file in root.glob(f"annotations/*{split}*"):
            file.rename(root / name / "_annotations.coco.json")
    if layout == "yolo":
        text = (
            "train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 3\nnames: ['cat', 'dog', 'eel']\n"
        )
        (root / "data.yaml").write_text(text)
    for part in ("images", "labels", "annotations", "Annotations", "JPEGImages", "ImageSets"):
        shutil.rmtree(root / part, ignore_errors=True)
    report = check(root)
    assert not report.problems
    assert boxes_of(report) == expected


def test_images_without_a_split_are_training_images(tmp_path):
    root = coco(tmp_path)
    (root / "annotations" / "instances_train2017.json").rename(root / "annotations" / "all.json")
    (root / "train2017").rename(root / "images")
    found = data(root)
    found.setup("fit")
    assert (len(found.datasets["train"]), len(found.datasets["val"])) == (5, 2)
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "test.json")
    (root / "val2017").rename(root / "test")
    found = data(root, test_fraction=0.4)
    assert {split: len(images) for split, images in found._images.items()} == {"train": 4, "val": 1, "test": 2}


def test_missing_training_images_raise_in_training_only(tmp_path):
    root = yolo(tmp_path)
    shutil.rmtree(root / "labels")
    refuses(DataError, "training images without any box; `visionattn data check", lambda: data(root).setup("fit"))
    shutil.rmtree(root / "images" / "train")
    refuses(DataError, "has no training images", lambda: data(root).setup("fit"))
    data(root).setup("validate")


def test_images_without_annotations_can_be_evaluated(tmp_path):
    picture(tmp_path / "images" / "test" / "one.png", 1)
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\n")
    found = data(tmp_path)
    found.setup("predict")
    (batch,) = found.predict_dataloader()
    assert batch["path"] == [str(tmp_path / "images" / "test" / "one.png")]
    assert found.class_names == ("cat", "dog")


def test_box_outside_the_crop_is_dropped_even_if_min_visible_is_zero(tmp_path):
    root = voc(tmp_path)
    crop = Augmentation([A.Crop(x_min=26, y_min=0, x_max=80, y_max=60, p=1)])
    found = data(root, augment=crop, min_visible=0.0)
    found.setup("fit")
    index = [image.path.name for image in found.datasets["train"].images].index("train_0.png")
    assert found.datasets["train"][index, 0]["labels"].tolist() == [
        2
    ]  # the cat's box ends at 25, the crop starts at 26
