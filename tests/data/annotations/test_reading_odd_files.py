"""Files as other tools write them, and files that contradict themselves: read right, counted, or refused."""

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
def test_case_and_bytes_before_the_text_do_not_matter(layout, tmp_path):
    expected = boxes_of(check(LAYOUTS[layout](tmp_path / "plain")))
    root = LAYOUTS[layout](tmp_path / "odd")
    for file in [file for file in root.rglob("*") if file.is_file()]:
        if file.suffix == ".txt" or file.suffix == ".json":
            file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
        if file.parent.name != "Main" and not (layout == "coco" and file.suffix == ".png"):
            file.rename(file.with_suffix(file.suffix.upper()) if file.suffix != ".yaml" else file.with_suffix(".YAML"))
        (file.parent / f"._{file.name}").write_bytes(b"what macOS leaves")
    report = check(root)
    assert not report.problems
    assert boxes_of(report) == expected


@pytest.mark.parametrize("layout", ["voc", "yolo"])
def test_a_json_of_something_else_is_not_coco(layout, tmp_path):
    root = LAYOUTS[layout](tmp_path)
    (root / "package.json").write_text('{"name": "mine"}')
    assert layout_of(root) == layout
    assert not check(root).problems


def test_one_folder_under_two_names_is_read_once(tmp_path):
    root = voc(tmp_path)
    (root / "annotations").symlink_to(root / "Annotations")
    assert not check(root).problems


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layouts_that_roboflow_writes(layout, tmp_path):
    """train/ and valid/, each with its images and annotations; YOLO's .yaml stands beside them and says ../."""
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


def test_images_that_no_file_gives_to_a_split_are_trained_on(tmp_path):
    root = coco(tmp_path)
    (root / "annotations" / "instances_train2017.json").rename(root / "annotations" / "all.json")
    (root / "train2017").rename(root / "images")
    found = data(root)
    found.setup("fit")
    assert (len(found.datasets["train"]), len(found.datasets["val"])) == (5, 2)
    (root / "annotations" / "instances_val2017.json").rename(root / "annotations" / "test.json")
    (root / "val2017").rename(root / "test")
    found = data(root, test_share=0.4)
    assert {split: len(images) for split, images in found._images.items()} == {"train": 4, "val": 1, "test": 2}


def test_nothing_to_train_on_is_refused_in_training_only(tmp_path):
    root = yolo(tmp_path)
    shutil.rmtree(root / "labels")
    refuses(DataError, "training images without any box; `visionattn data check", lambda: data(root).setup("fit"))
    shutil.rmtree(root / "images" / "train")
    refuses(DataError, "has no training images", lambda: data(root).setup("fit"))
    data(root).setup("validate")


def test_images_that_nobody_annotated_can_be_looked_at(tmp_path):
    picture(tmp_path / "images" / "test" / "one.png", 1)
    (tmp_path / "data.yaml").write_text("names: [cat, dog]\n")
    found = data(tmp_path)
    found.setup("predict")
    (batch,) = found.predict_dataloader()
    assert batch["path"] == [str(tmp_path / "images" / "test" / "one.png")]
    assert found.class_names == ("cat", "dog")


def test_a_box_that_is_cut_off_is_never_trained_on_however_little_may_be_left(tmp_path):
    root = voc(tmp_path)
    crop = Augmentation([A.Crop(x_min=26, y_min=0, x_max=80, y_max=60, p=1)])
    found = data(root, augment=crop, min_visible=0.0)
    found.setup("fit")
    index = [image.path.name for image in found.datasets["train"].images].index("train_0.png")
    assert found.datasets["train"][index, 0]["labels"].tolist() == [2]  # the cat ends at 25
