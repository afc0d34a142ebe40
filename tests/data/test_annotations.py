"""Three layouts, one form; and everything that can be wrong with boxes is counted and named."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from tests.data.annotated import GAPS, LAYOUTS, NAMES, SCENES, coco, picture, voc, yolo
from visionattn.cli import main
from visionattn.data.annotations import layout_of, read_annotations
from visionattn.data.boxes import settle
from visionattn.data.checking import check, size_of
from visionattn.data.decode import read_image
from visionattn.errors import DataError


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_as_the_same_boxes(layout, tmp_path):
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


def test_ids_with_gaps_are_kept(tmp_path):
    found = read_annotations(coco(tmp_path))
    assert found.category_ids == GAPS
    chosen = read_annotations(tmp_path, class_names=["eel", "cat"])
    assert chosen.category_ids == (90, 3)
    assert Counter(problem.kind for problem in chosen.problems) == {"unknown class": 4}
    with pytest.raises(DataError, match=r"has no class 'cta'\. Nearest: cat"):
        read_annotations(tmp_path, class_names=["cta"])


def spoiled(root):
    """Each kind of problem a known number of times."""
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())

    def add(image_id, box, category=3, **more):
        content["annotations"].append({"id": 900, "image_id": image_id, "category_id": category, "bbox": box, **more})

    add(1, [float("nan"), 2, 8, 9])
    add(1, [1, 2, float("inf"), 9])
    add(1, [1, 2, 3])
    add(1, None)
    add(1, [30, 20, -8, 9])
    add(1, [30, 20, 0, 9])
    add(1, [30, 20, 9, 0.4])
    add(1, [90, 20, 9, 9])
    add(1, [70, 50, 30, 30])
    add(1, [5, 6, 20, 30])
    add(1, [30, 30, 10, 10], category=4)
    add(555, [30, 30, 10, 10])
    content["images"].append({"id": 777, "file_name": "gone.png", "height": 60, "width": 80})
    content["images"].append({"id": 778, "file_name": "text.png", "height": 60, "width": 80})
    content["images"].append({"id": 779, "file_name": "other.png", "height": 61, "width": 80})
    content["images"].append({"id": 780, "file_name": "train_0.png", "height": 60, "width": 80})
    content["images"].append({"id": 781, "file_name": "twin.png", "height": 60, "width": 80})
    content["images"].append({"id": 782, "file_name": "leak.png", "height": 60, "width": 80})
    (root / "train2017" / "text.png").write_text("no image")
    picture(root / "train2017" / "other.png", 99)
    (root / "train2017" / "twin.png").write_bytes((root / "train2017" / "train_0.png").read_bytes())
    (root / "train2017" / "leak.png").write_bytes((root / "val2017" / "val_0.png").read_bytes())
    file.write_text(json.dumps(content))
    return root


SPOILED = {
    "not finite": 4, "inverted": 1, "empty": 2, "outside": 1, "over the edge": 1, "duplicate box": 1,
    "unknown class": 1, "unknown image": 1, "missing image": 1, "unreadable image": 1, "wrong size": 1,
    "listed twice": 1, "twin": 1, "leak": 1,
}  # fmt: skip


def test_every_bad_box_and_image_is_counted(tmp_path, capsys):
    root = spoiled(coco(tmp_path))
    report = check(root)
    assert Counter(problem.kind for problem in report.problems) == SPOILED
    first = report.splits["train"][0]
    np.testing.assert_array_equal(first.boxes, [[5, 6, 25, 36], [40, 10, 79, 50], [70, 50, 80, 60]])  # the last was cut
    assert main(["data", "check", str(root), "--limit", "2"]) == 1
    told = capsys.readouterr().out
    for kind, count in SPOILED.items():
        assert f"{count} {kind}: " in told
    assert "… and 2 more" in told
    assert "train_0.png: box 3 (nan, 2, nan, 11)" in told
    assert "train  7 images, 3 without boxes; 9 good boxes: cat 4, dog 3, eel 2" in told


def test_clean_data_ends_well(tmp_path, capsys):
    assert main(["data", "check", str(voc(tmp_path))]) == 0
    assert "no problems" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "nothing")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_bad_xml_and_bad_lines_are_named(tmp_path):
    root = voc(tmp_path / "voc")
    (root / "Annotations" / "train_1.xml").write_text("<annotation><object>")
    (root / "JPEGImages" / "train_3.png").unlink()
    kinds = Counter(problem.kind for problem in check(root).problems)
    assert kinds == {"unreadable annotation": 1, "not annotated": 1, "missing image": 1}
    root = yolo(tmp_path / "yolo")
    (root / "labels" / "train" / "train_1.txt").write_text("1 0.5 0.5 1.0\nx 1 2 3 4\n7 .5 .5 .1 .1\n0.5 .5 .5 .1 .1\n")
    (root / "labels" / "train" / "stray.txt").write_text("1 0.5 0.5 1.0 1.0\n")
    kinds = Counter(problem.kind for problem in check(root).problems)
    assert kinds == {"unreadable annotation": 2, "unknown class": 2, "missing image": 1}


def test_a_polygon_is_its_hull(tmp_path):
    root = yolo(tmp_path)
    (root / "labels" / "val" / "val_1.txt").write_text("0 0.25 0.5 0.5 0.25 0.55 0.8 0.3 0.75\n")
    (box,) = check(root).splits["val"][1].boxes
    np.testing.assert_allclose(box, [20, 15, 44, 48])


@pytest.mark.parametrize("wrong", ["xyxy", "cxcywh"])
def test_another_format_is_named(wrong, tmp_path):
    """Many boxes, since a few can be mistaken; each form written by hand."""
    root = coco(tmp_path)
    file = root / "annotations" / "instances_train2017.json"
    content = json.loads(file.read_text())
    random = np.random.default_rng(0)
    content["annotations"] = []
    for number in range(60):
        x1, y1 = random.uniform(0, 50), random.uniform(0, 30)
        x2, y2 = random.uniform(x1 + 5, 80), random.uniform(y1 + 5, 60)
        box = [x1, y1, x2, y2] if wrong == "xyxy" else [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
        content["annotations"].append({"id": number, "image_id": 1, "category_id": 3, "bbox": box})
    file.write_text(json.dumps(content))
    problems = check(root).problems
    assert f"as {wrong} only; set box_format: {wrong}" in next(p.detail for p in problems if p.kind == "wrong format")
    assert not [p for p in check(root, box_format=wrong).problems if p.kind == "wrong format"]


def test_shares_and_pixels_are_told_apart(tmp_path):
    root = voc(tmp_path / "voc")
    for file in (root / "Annotations").glob("*.xml"):
        text = file.read_text()
        for number in range(80, 0, -1):
            text = text.replace(f">{number}</x", f">{number / 80}</x").replace(f">{number}</y", f">{number / 60}</y")
        file.write_text(text)
    assert any("look like shares" in problem.detail for problem in check(root).problems)
    root = yolo(tmp_path / "yolo")
    for file in (root / "labels" / "train").glob("*.txt"):
        file.write_text("0 40 30 20 10\n1 20 20 10 10\n0 30 30 9 9\n")
    assert any("look like pixels" in problem.detail for problem in check(root).problems)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp"])
def test_a_turned_photograph_has_the_size_that_it_is_seen_with(suffix, tmp_path):
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = tmp_path / f"{orientation}{suffix}"
        Image.new("RGB", (80, 60)).save(file, exif=exif)
        assert size_of(file) == read_image(file).shape[:2] == ((80, 60) if orientation > 4 else (60, 80))


@pytest.mark.parametrize("behind", [False, True])
def test_so_does_a_turned_png_whose_pixels_are_not_decoded(behind, tmp_path):
    file = tmp_path / "x.png"
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (80, 60)).save(file, exif=turned)
    content = file.read_bytes()
    start = content.index(b"eXIf") - 4
    exif = content[start : start + 12 + int.from_bytes(content[start : start + 4], "big")]
    bare = content.replace(exif, b"")
    at = bare.index(b"IEND" if behind else b"IDAT") - 4
    file.write_bytes(bare[:at] + exif + bare[at:])
    assert size_of(file) == (80, 60)
    pixels = bare.index(b"IDAT") + 4
    file.write_bytes(bare[:pixels] + bytes(10) + bare[pixels + 10 :])
    assert size_of(file) == (60, 80)
    with pytest.raises(DataError):
        read_image(file)


def test_split_files_replace_the_splits(tmp_path):
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


def test_a_folder_without_annotations_is_told(tmp_path):
    with pytest.raises(DataError, match="holds no annotations"):
        read_annotations(tmp_path)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(DataError, match=r"no \.json there is COCO's"):
        read_annotations(tmp_path)
