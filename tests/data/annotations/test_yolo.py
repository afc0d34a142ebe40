"""Test the YOLO layout."""

from collections import Counter

import numpy as np

from tests.data.annotated import picture, yolo
from tests.refusals import refuses
from visionattn.data.annotations.checks import check
from visionattn.data.annotations.reading import read_annotations
from visionattn.errors import DataError


def test_class_names_select_yolo_classes_and_may_come_from_the_caller(tmp_path):
    root = yolo(tmp_path)
    found = read_annotations(root, class_names=["eel", "cat"])
    assert (found.class_names, found.category_ids) == (("eel", "cat"), (2, 0))
    assert found.splits["train"][0].labels.tolist() == [1, 0]
    refuses(DataError, r"has no class 'cta'\. Nearest: cat", read_annotations, root, class_names=["cta"])
    (root / "data.yaml").write_text("names: [cat, cat, eel]")
    merged = read_annotations(root)  # the dogs are now named cat as well
    assert merged.class_names == ("cat", "eel")
    assert merged.splits["train"][3].labels.tolist() == [0, 0, 0]  # the classes 0, 0 and 1 in the file
    (root / "data.yaml").write_text("names: cat")
    refuses(DataError, "names must be a list of names or map numbers to names, not 'cat'", read_annotations, root)
    (root / "data.yaml").unlink()
    unnamed = read_annotations(root, class_names=["a", "b", "c", "d"])
    assert unnamed.class_names == ("a", "b", "c", "d")  # no box has class d
    (root / "labels" / "train" / "train_0.txt").write_text("inf .5 .5 .1 .1\n900000000000 .5 .5 .1 .1\n")
    bare = read_annotations(root)
    assert bare.class_names == ("class 0", "class 1", "class 2", "class 900000000000")
    assert [problem.kind for problem in bare.problems] == ["unreadable annotation"]


def test_labels_without_images_are_reported_in_any_folder(tmp_path):
    root = yolo(tmp_path)
    for place in ("train/deep", "test"):
        (root / "labels" / place).mkdir()
        (root / "labels" / place / "lost.txt").write_text("0 .5 .5 .1 .1\n")
    (root / "labels" / "extra").mkdir()
    (root / "labels" / "extra" / "other.txt").write_text("0 .5 .5 .1 .1\n")
    picture(root / "images" / "extra" / "other.png", 5)  # no split has this image, but it is not missing
    assert [problem[:2] for problem in check(root).problems] == [("missing image", "lost.txt")] * 2
    (root / "some.txt").write_text("images/train/train_0.png\nimages/train/gone.png\n")
    (root / "data.yaml").write_text("train: some.txt\nval: images/val\nnames: [cat, dog, eel]\n")
    assert Counter(problem[:2] for problem in check(root).problems)["missing image", "gone.txt"] == 1


def test_polygon_is_replaced_by_its_bounding_box(tmp_path):
    root = yolo(tmp_path)
    (root / "labels" / "val" / "val_1.txt").write_text("0 0.25 0.5 0.5 0.25 0.55 0.8 0.3 0.75\n")
    (box,) = check(root).splits["val"][1].boxes
    np.testing.assert_allclose(box, [20, 15, 44, 48])
