"""Test detection data: augmentation and preprocessing move boxes with their pixels; bad boxes are left out."""

import json

import albumentations as A
import cv2
import numpy as np
import pytest
from PIL import Image

from tests.data.annotated import GAPS, NAMES, SCENES, coco, voc
from tests.data.annotations.spoiled import spoiled
from tests.refusals import refuses
from visionattn.data import AnnotatedData, Preprocess
from visionattn.data.transforms import Augmentation
from visionattn.errors import DataError, UsageError


def blocks(root, boxes):
    """Write the images of `voc`, but replace train_0.png by white blocks on black with these boxes."""
    picture = np.zeros((90, 120, 3), np.uint8)
    for x1, y1, x2, y2 in boxes:
        picture[y1:y2, x1:x2] = 255
    voc(root)
    Image.fromarray(picture).save(root / "JPEGImages" / "train_0.png")
    items = "".join(
        f"<object><name>cat</name><bndbox><xmin>{a}</xmin><ymin>{b}</ymin><xmax>{c}</xmax><ymax>{d}</ymax></bndbox></object>"
        for a, b, c, d in boxes
    )
    (root / "Annotations" / "train_0.xml").write_text(f"<annotation>{items}</annotation>")
    return str(root)


@pytest.mark.parametrize(
    "transforms",
    [
        [],
        [A.HorizontalFlip(p=1)],
        [A.RandomResizedCrop((80, 100), scale=(0.4, 0.9), p=1)],
        [A.Affine(scale=(0.6, 1.3), translate_percent=(-0.2, 0.2), p=1), A.RandomRotate90(p=1)],
    ],
    ids=["none", "flip", "crop", "affine"],
)
def test_boxes_follow_their_pixels(transforms, tmp_path):
    root = blocks(tmp_path, [(10, 20, 60, 70)])
    augment = Augmentation(transforms) if transforms else None
    data = AnnotatedData(root, augment=augment, preprocess=Preprocess(96, fit="letterbox"), num_workers=0)
    data.setup("fit")
    checked = 0
    for seed in range(12):
        sample = data.datasets["train"][0, seed]
        bright = sample["image"][0].numpy() > 0
        mean_fill = sample["image"][0].numpy() == 0  # the padding of the letterbox is the mean colour
        rows, columns = np.nonzero(bright & ~mean_fill)
        for box in sample["boxes"].tolist():
            assert 0 <= box[0] < box[2] <= 96
            assert 0 <= box[1] < box[3] <= 96
            hull = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_allclose(box, hull, atol=1.6)
            checked += 1
    assert checked >= 8


def test_training_drops_boxes_of_which_too_little_is_visible(tmp_path):
    root = blocks(tmp_path, [(0, 0, 20, 20), (60, 40, 110, 80)])
    crop = Augmentation([A.Crop(x_min=18, y_min=0, x_max=120, y_max=90, p=1)])
    data = AnnotatedData(root, augment=crop, num_workers=0, preprocess=Preprocess((90, 102), fit="stretch"))
    data.setup("fit")
    sample = data.datasets["train"][0, 1]
    np.testing.assert_allclose(sample["boxes"].numpy(), [[42, 40, 92, 80]])
    data.min_visible = 0.05
    np.testing.assert_allclose(data.dataset("train")[0, 1]["boxes"][0].numpy(), [0, 0, 2, 20])


def test_validation_keeps_every_box(tmp_path):
    data = AnnotatedData(str(coco(tmp_path)), preprocess=Preprocess(4, fit="letterbox"), num_workers=0, batch_size=8)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert [len(boxes) for boxes in batch["boxes"]] == [2, 1]
    assert batch["image_id"].tolist() == [1, 11]
    assert data.category_ids == GAPS


def test_a_batch_holds_lists_of_boxes(tmp_path):
    data = AnnotatedData(str(voc(tmp_path)), preprocess=Preprocess(40, fit="letterbox"), num_workers=0, batch_size=8)
    data.setup("fit")
    (batch,) = data.val_dataloader()
    assert batch["image"].shape == (2, 3, 40, 40)
    assert data.class_names == NAMES
    for boxes, placement, scene in zip(batch["boxes"], batch["placement"], SCENES["val"], strict=True):
        np.testing.assert_allclose(placement.boxes_to_source(boxes.numpy()), [row[1:] for row in scene], atol=1e-4)


def test_bad_boxes_are_refused_or_dropped_with_their_count(tmp_path):
    root = str(spoiled(coco(tmp_path)))
    refuses(DataError, r"4 not finite, 1 inverted, 2 empty, .*bad_boxes: drop", AnnotatedData, root)
    with pytest.warns(UserWarning, match="left out or clipped 4 not finite, 1 inverted"):
        data = AnnotatedData(root, bad_boxes="drop", num_workers=0, preprocess=Preprocess(64, fit="letterbox"))
    data.setup("fit")
    for index in range(len(data.datasets["train"])):
        boxes = data.datasets["train"][index]["boxes"]
        assert boxes.isfinite().all()
        assert (boxes[:, 2:] - boxes[:, :2] >= 0.5).all()


def test_wrong_box_format_always_raises(tmp_path):
    root = coco(tmp_path)
    for split in SCENES:
        file = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        for annotation in content["annotations"]:
            x, y, width, height = annotation["bbox"]
            annotation["bbox"] = [x, y, x + width, y + height]
        file.write_text(json.dumps(content))
    with pytest.raises(DataError, match=r"read as xywh, but only .*, and 100% fit xyxy; set box_format: xyxy"):
        AnnotatedData(str(root), bad_boxes="drop")
    data = AnnotatedData(str(root), box_format="xyxy")
    assert not data.problems


def test_missing_splits_are_drawn_without_leaks(tmp_path):
    root = voc(tmp_path)
    for file in (root / "ImageSets" / "Main").iterdir():
        file.unlink()
    for number in range(8):  # add eight copies of an image, which must not be divided between train and val
        (root / "JPEGImages" / f"t{number}.png").write_bytes((root / "JPEGImages" / "train_0.png").read_bytes())
        (root / "Annotations" / f"t{number}.xml").write_text((root / "Annotations" / "train_0.xml").read_text())
    with pytest.warns(UserWarning, match=r"left out \d training images .* e\.g\. \w+\.png and \w+\.png; remove"):
        data = AnnotatedData(str(root), val_fraction=0.3, test_fraction=0.2, num_workers=0)
    content = {split: {image.path.read_bytes() for image in images} for split, images in data._images.items()}
    assert all(data._images[split] for split in ("train", "val", "test"))
    assert not content["train"] & (content["val"] | content["test"])


def test_a_changed_box_or_label_changes_the_listing_and_the_order_of_the_classes_does_not(tmp_path):
    root = voc(tmp_path)
    before = AnnotatedData(str(root)).listing("train")
    assert list(before) == [f"JPEGImages/train_{number}.png" for number in range(5)]
    assert AnnotatedData(str(root), class_names=NAMES[::-1]).listing("train") == before
    for number, (old, new) in enumerate((("<xmin>5<", "<xmin>6<"), ("dog", "eel"), ("<filename>", "<filename>"))):
        file = root / "Annotations" / f"train_{number}.xml"
        file.write_text(file.read_text().replace(old, new))
    after = AnnotatedData(str(root)).listing("train")
    assert [name for name in before if after[name] != before[name]] == list(before)[:2]


def test_cropping_preprocess_raises(tmp_path):
    refuses(UsageError, "letterbox or stretch", lambda: AnnotatedData(str(voc(tmp_path)), preprocess=Preprocess(64)))


@pytest.mark.parametrize("unreadable", ["stop", "skip"])
def test_truncated_image_is_named_when_read(unreadable, tmp_path):
    root = blocks(tmp_path, [(10, 20, 60, 70)])
    data = AnnotatedData(root, unreadable=unreadable, num_workers=0)
    broken = tmp_path / "JPEGImages" / "train_0.png"
    broken.write_bytes(broken.read_bytes()[:100])
    data.setup("fit")
    data.batch_size = len(data.datasets["train"])
    if unreadable == "stop":
        refuses(DataError, r"train_0\.png", lambda: list(data.train_dataloader()))
        return
    loaded = [path for batch in data.train_dataloader() for path in batch["path"]]
    assert loaded
    assert str(broken) not in loaded
    assert list(data.skipped) == [str(broken)]


@pytest.mark.parametrize("border", [cv2.BORDER_REFLECT, cv2.BORDER_REFLECT_101, cv2.BORDER_WRAP])
def test_borders_that_repeat_objects_are_refused(border, tmp_path):
    augment = Augmentation([A.HorizontalFlip(), A.OneOf([A.PadIfNeeded(256, 256, border_mode=border)])])
    root = str(voc(tmp_path))
    refuses(
        UsageError, "copies of objects would have no boxes; set border_mode: 0", AnnotatedData, root, augment=augment
    )
    plain = Augmentation([A.PadIfNeeded(256, 256), A.Affine(scale=0.5, border_mode=cv2.BORDER_REPLICATE)])
    assert AnnotatedData(root, augment=plain).augment is plain
    refuses(UsageError, "--data.root: s3://boxes is an address", AnnotatedData, "s3://boxes")
