"""Test folders of images with a sub-folder for each class."""

import shutil

import numpy as np
import pytest
from PIL import Image

from tests.refusals import refuses
from visionattn.data import ImageFolderData, image_folder
from visionattn.data.image_folder import find_classes
from visionattn.errors import DataError, UsageError


def paths(data, split):
    """Return the set of paths of a split."""
    return {path for path, _ in data._files[split]}


def test_class_folders_are_split_by_name_with_similar_fractions_per_class(photo_folder):
    data = ImageFolderData(str(photo_folder), val_fraction=0.25, test_fraction=0.25, num_workers=0)
    assert data.class_names == tuple(f"class{number}" for number in range(5))
    parts = [paths(data, split) for split in ("train", "val", "test")]
    for part in parts:  # the twelve images of each class have the same names
        assert len(part) == 5 * len({path.name for path in part}) > 0
    assert data.class_counts.tolist() == [len(parts[0]) / 5] * 5
    assert len(set.union(*parts)) == 60
    same_seed = ImageFolderData(str(photo_folder), val_fraction=0.25, test_fraction=0.25, num_workers=0)
    other_seed = ImageFolderData(str(photo_folder), val_fraction=0.25, test_fraction=0.25, num_workers=0, seed=1)
    assert paths(same_seed, "val") == parts[1] != paths(other_seed, "val")


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
    assert (len(train | val), len(val), len(test)) == (60, 5 * len({path.name for path in val}), 60)
    assert not train & val
    assert {path.parent.parent.name for path in train | val} == {"train"}
    assert {path.parent.parent.name for path in test} == {"test"}


def test_folders_with_different_classes_raise(photo_folder, tmp_path):
    (tmp_path / "train").symlink_to(photo_folder)
    (tmp_path / "val").mkdir()
    for number in range(4):
        (tmp_path / "val" / f"class{number}").symlink_to(photo_folder / f"class{number}")
    refuses(DataError, "'class4' is missing from", lambda: ImageFolderData(str(tmp_path)))


def test_an_image_keeps_its_split_when_images_are_removed_or_moved_to_another_class(photo_folder, tmp_path):
    root = tmp_path / "photos"
    shutil.copytree(photo_folder, root)
    options = {"val_fraction": 0.25, "test_fraction": 0.25, "num_workers": 0}
    before = ImageFolderData(str(root), **options)
    (root / "class0" / "3.png").unlink()
    moved = root / "class1" / "8.png"
    (split_of_moved,) = [split for split in before._files if moved in paths(before, split)]
    (root / "class2" / "8.png").unlink()
    moved.rename(root / "class2" / "8.png")
    after = ImageFolderData(str(root), **options)
    for split in ("train", "val", "test"):
        assert paths(after, split) == {path for path in paths(before, split) if path.exists()}
    assert root / "class2" / "8.png" in paths(after, split_of_moved)


def test_names_of_splits_may_be_in_upper_or_lower_case(photo_folder, tmp_path):
    for name in ("Training", "VALID", "Test"):
        (tmp_path / name).symlink_to(photo_folder)
    data = ImageFolderData(str(tmp_path), num_workers=0)
    assert data.class_names == tuple(f"class{number}" for number in range(5))
    assert [len(paths(data, split)) for split in ("train", "val", "test")] == [60, 60, 60]
    (tmp_path / "train").symlink_to(photo_folder)
    refuses(DataError, "two folders of train images, train/ and Training/; keep one", ImageFolderData, str(tmp_path))
    for name in ("train", "Training"):
        (tmp_path / name).unlink()
    refuses(DataError, "has VALID/, Test/ but no train/; add train/", ImageFolderData, str(tmp_path))


def test_a_folder_that_is_named_like_a_split_and_holds_images_is_a_class(photo_folder, tmp_path):
    for number, name in enumerate(("reading", "running", "training")):
        (tmp_path / name).symlink_to(photo_folder / f"class{number}")
    with pytest.warns(UserWarning, match="training/ is taken as a class, because it has no class folders; move"):
        data = ImageFolderData(str(tmp_path), num_workers=0)
    assert data.class_names == ("reading", "running", "training")
    for name in ("reading", "running"):
        (tmp_path / name).unlink()
    refuses(DataError, "training has no sub-folders; the images of each class", ImageFolderData, str(tmp_path))


def test_the_order_of_files_does_not_depend_on_the_file_system(photo_folder, tmp_path, monkeypatch):
    """img1 and img01 have the same number, so only their names order them."""
    names = ["img1", "img01", "img001", "img2", "img10"]
    for label in ("a1", "a01", "b"):
        (tmp_path / label).mkdir()
        for name in names:
            (tmp_path / label / f"{name}.png").write_bytes((photo_folder / "class0" / "0.png").read_bytes())
    plain = image_folder._entries
    orders = []
    for direction in (1, -1):
        monkeypatch.setattr(
            image_folder, "_entries", lambda *args, d=direction, **options: sorted(plain(*args, **options))[::d]
        )
        orders.append({name: [path.name for path in files] for name, files in find_classes(tmp_path).items()})
    assert list(orders[0].items()) == list(orders[1].items())
    assert list(orders[0]) == ["a01", "a1", "b"]
    assert orders[0]["b"] == ["img001.png", "img01.png", "img1.png", "img2.png", "img10.png"]


def test_classes_with_nearly_the_same_name_are_reported(photo_folder, tmp_path):
    for number, name in enumerate(("Cat", "cat", "dog")):
        (tmp_path / name).symlink_to(photo_folder / f"class{number}")
    with pytest.warns(UserWarning, match="the classes 'Cat' and 'cat', whose names are nearly equal; if they are"):
        ImageFolderData(str(tmp_path), num_workers=0)


def test_an_address_as_root_is_refused():
    refuses(
        UsageError, "--data.root: s3://photos is an address, and only files on this", ImageFolderData, "s3://photos"
    )
