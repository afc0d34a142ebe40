"""Files as other tools write them, and files that contradict themselves: read right, counted, or refused."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter

import albumentations as A
import numpy as np
import pytest

from tests.data.annotated import GAPS, LAYOUTS, SCENES, coco, picture, voc, yolo
from visionattn.cli import main
from visionattn.data import AnnotatedData, Preprocess
from visionattn.data.annotations import layout_of, read_annotations
from visionattn.data.checking import check
from visionattn.data.transforms import Augmentation
from visionattn.errors import DataError, UsageError


def change(root, function, split="train"):
    file = root / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    function(content)
    file.write_text(json.dumps(content))


def boxes_of(report):
    return {
        split: [np.c_[image.labels, image.boxes].round(3).tolist() for image in images]
        for split, images in report.splits.items()
    }


def texts(content):
    """Numbers as text."""
    for name, keys in {"images": ["id"], "categories": ["id"], "annotations": ["image_id", "category_id"]}.items():
        for one in content[name]:
            one |= {key: str(one[key]) for key in keys}


def without_sizes(content):
    for number, image in enumerate(content["images"]):
        image["width"] = None if number % 2 else "?"
        if number == 2:
            del image["height"]


def twice_named(content):
    """As some exporters do: the data set's own name is a first class without boxes."""
    content["categories"].insert(0, {"id": 0, "name": "cat", "supercategory": "none"})


@pytest.mark.parametrize("odd", [texts, without_sizes, twice_named])
def test_coco_by_other_tools(odd, tmp_path):
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
def test_coco_that_contradicts_itself_is_refused(odd, told, tmp_path):
    change(coco(tmp_path), odd)
    with pytest.raises(DataError, match=told):
        check(tmp_path)


def test_images_that_share_an_id_have_no_boxes_that_are_known(tmp_path):
    change(coco(tmp_path), lambda content: content["images"][1].update(id=content["images"][0]["id"]))
    report = check(tmp_path)
    assert Counter(problem.kind for problem in report.problems) == {"shared id": 2, "unknown image": 1}
    assert [image.path.name for image in report.splits["train"]] == ["train_2.png", "train_3.png", "train_4.png"]
    assert any("shared id: images that have" in line for line in report.lines())


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


def test_an_object_without_a_name_is_of_no_class(tmp_path):
    root = voc(tmp_path)
    file = root / "Annotations" / "train_0.xml"
    file.write_text(file.read_text().replace("<name>cat</name>", ""))
    (root / "Annotations" / "train_1.xml").write_text("<?xml version='1.0' encoding='foo'?><annotation/>")
    report = check(root)
    assert report.class_names == ("cat", "dog", "eel")
    kinds = Counter(problem.kind for problem in report.problems)
    assert kinds == {"unknown class": 1, "unreadable annotation": 1, "not annotated": 1}


def test_classes_of_yolo_are_those_that_are_asked_for(tmp_path):
    root = yolo(tmp_path)
    found = read_annotations(root, class_names=["eel", "cat"])
    assert (found.class_names, found.category_ids) == (("eel", "cat"), (2, 0))
    assert found.splits["train"][0].labels.tolist() == [1, 0]
    with pytest.raises(DataError, match=r"has no class 'cta'\. Nearest: cat"):
        read_annotations(root, class_names=["cta"])
    (root / "data.yaml").write_text("names: [cat, cat, eel]")
    twice = read_annotations(root)
    assert twice.class_names == ("cat", "eel")
    assert twice.splits["train"][3].labels.tolist() == [0, 0, 0]  # two cats and a dog
    (root / "data.yaml").write_text("names: cat")
    with pytest.raises(DataError, match="names must be a list, or numbers with a name each, not 'cat'"):
        read_annotations(root)
    (root / "data.yaml").unlink()
    wide = read_annotations(root, class_names=["a", "b", "c", "d"])
    assert wide.class_names == ("a", "b", "c", "d")  # the last has no box
    (root / "labels" / "train" / "train_0.txt").write_text("inf .5 .5 .1 .1\n900000000000 .5 .5 .1 .1\n")
    bare = read_annotations(root)
    assert bare.class_names == ("class 0", "class 1", "class 2", "class 900000000000")
    assert [problem.kind for problem in bare.problems] == ["unreadable annotation"]


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


def test_labels_without_images_are_told_wherever_they_lie(tmp_path):
    root = yolo(tmp_path)
    for place in ("train/deep", "test"):
        (root / "labels" / place).mkdir()
        (root / "labels" / place / "lost.txt").write_text("0 .5 .5 .1 .1\n")
    (root / "labels" / "extra").mkdir()
    (root / "labels" / "extra" / "other.txt").write_text("0 .5 .5 .1 .1\n")
    picture(root / "images" / "extra" / "other.png", 5)  # in no split, and not missing
    assert [problem[:2] for problem in check(root).problems] == [("missing image", "lost.txt")] * 2
    (root / "some.txt").write_text("images/train/train_0.png\nimages/train/gone.png\n")
    (root / "data.yaml").write_text("train: some.txt\nval: images/val\nnames: [cat, dog, eel]\n")
    assert Counter(problem[:2] for problem in check(root).problems)["missing image", "gone.txt"] == 1


def test_split_files_take_names_with_blanks_and_tell_folders_apart(tmp_path):
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
    assert {split: [image.path.parent.name for image in some] for split, some in report.splits.items()} == {
        "train": ["train", "train"],
        "val": ["val"],
    }
    (root / "a.txt").write_text("0.png\n")
    with pytest.raises(DataError, match=r"a\.txt: 0\.png may be .*train/0\.png or .*val/0\.png; write the folder"):
        check(root, splits={"train": str(root / "a.txt")})
    with pytest.raises(UsageError, match=r"splits are train, val and test, not 'trian'\. Nearest: train"):
        check(root, splits={"trian": str(root / "a.txt")})


def test_names_that_no_terminal_can_show_are_told(tmp_path):
    root = yolo(tmp_path / "data")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [çat, dog, eel]\n", encoding="utf-8")
    (root / "images" / "train" / "train_2.png").rename(root / "images" / "train" / os.fsdecode(b"caf\xe9.png"))
    (root / "labels" / "train" / os.fsdecode(b"caf\xe9.txt")).write_text("0 nan .5 .1 .1\n")
    command = [sys.executable, "-m", "visionattn.cli", "data", "check", str(root)]
    for encoding, told in (("ascii", b"\\xe7at 3"), ("utf-8", "çat 3".encode())):
        done = subprocess.run(
            command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding + ":strict"}
        )
        assert done.returncode == 1, done.stderr
        assert told in done.stdout
        assert b"caf\\udce9.txt: box 1 (nan" in done.stdout


def test_wrong_calls_of_the_check_are_told(tmp_path, capsys):
    root = str(yolo(tmp_path))
    assert main(["data", "check", root, "--limit", "0"]) == 2
    assert main(["data", "check", root, "--images", "nothing"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: --limit must be at least 1, got 0",
        "error: there is no folder of images nothing",
    ]


def test_a_bad_box_in_two_splits_is_counted_once(tmp_path):
    root = voc(tmp_path)
    file = root / "Annotations" / "train_0.xml"
    file.write_text(file.read_text().replace("<xmin>5</xmin>", "<xmin>nan</xmin>"))
    names = root / "ImageSets" / "Main" / "val.txt"
    names.write_text("train_0\nval_1\n")
    assert Counter(problem.kind for problem in check(root).problems) == {"not finite": 1, "leak": 1}


def data(root, **options):
    return AnnotatedData(str(root), num_workers=0, preprocess=Preprocess(64, fit="letterbox"), **options)


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


def test_trainval_is_trained_on_where_there_is_no_train(tmp_path):
    root = voc(tmp_path)
    lists = root / "ImageSets" / "Main"
    (lists / "train.txt").rename(lists / "trainval.txt")
    (lists / "val.txt").rename(lists / "test.txt")
    assert {split: len(images) for split, images in data(root)._images.items()} == {"train": 4, "val": 1, "test": 2}


def test_nothing_to_train_on_is_refused_in_training_only(tmp_path):
    root = yolo(tmp_path)
    shutil.rmtree(root / "labels")
    with pytest.raises(DataError, match="training images without any box; `visionattn data check"):
        data(root).setup("fit")
    shutil.rmtree(root / "images" / "train")
    with pytest.raises(DataError, match="has no training images"):
        data(root).setup("fit")
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
