"""Test folders of images with a sub-folder for each class."""

import numpy as np
from PIL import Image

from tests.refusals import refuses
from visionattn.data import ImageFolderData
from visionattn.errors import DataError


def paths(data, split):
    return {path for path, _ in data._files[split]}


def test_single_folder_is_split_by_class_and_seed(photo_folder):
    data = ImageFolderData(str(photo_folder), val_fraction=0.25, test_fraction=0.25, num_workers=0)
    assert data.class_names == tuple(f"class{number}" for number in range(5))
    assert data.class_counts.tolist() == [6] * 5
    parts = [paths(data, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [30, 15, 15]
    assert len(set.union(*parts)) == 60
    again = ImageFolderData(str(photo_folder), val_fraction=0.25, test_fraction=0.25, num_workers=0)
    other = ImageFolderData(str(photo_folder), val_fraction=0.25, test_fraction=0.25, num_workers=0, seed=1)
    assert paths(again, "val") == parts[1] != paths(other, "val")


def test_split_folders_are_used_unchanged(photo_folder, tmp_path):
    for split in ("train", "valid"):
        (tmp_path / split).symlink_to(photo_folder)
    data = ImageFolderData(str(tmp_path), num_workers=0, batch_size=7)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (7, 3, 224, 224)
    assert all(
        int(path.split("class")[1][0]) == label for path, label in zip(batch["path"], batch["label"], strict=True)
    )
    picture = np.array(Image.open(batch["path"][0]))
    np.testing.assert_array_equal(data.datasets["train"].read_source(batch["path"][0]), picture)
    refuses(DataError, "no test split", data.setup, "test")


def test_without_a_val_folder_validation_images_come_from_train(photo_folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(photo_folder)
    data = ImageFolderData(str(tmp_path), val_fraction=0.25, test_fraction=0.5, num_workers=0)
    train, val, test = (paths(data, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (45, 15, 60)
    assert not train & val
    assert {path.parent.parent.name for path in train | val} == {"train"}
    assert {path.parent.parent.name for path in test} == {"test"}


def test_folders_with_different_classes_raise(photo_folder, tmp_path):
    (tmp_path / "train").symlink_to(photo_folder)
    (tmp_path / "val").mkdir()
    for number in range(4):
        (tmp_path / "val" / f"class{number}").symlink_to(photo_folder / f"class{number}")
    refuses(DataError, "'class4' is missing from", lambda: ImageFolderData(str(tmp_path)))
