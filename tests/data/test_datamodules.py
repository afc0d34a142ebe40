"""The data of a training: splits, folders, torchvision's sets, batches."""

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from visionattn.data import ClutteredDigitsData, ImageFolderData, TorchvisionData
from visionattn.errors import DataError


def paths(data, split):
    return {path for path, _ in data._files[split]}


def test_one_folder_is_split_by_class_and_seed(photo_folder):
    data = ImageFolderData(str(photo_folder), val_share=0.25, test_share=0.25, num_workers=0)
    assert data.class_names == tuple(f"class{number}" for number in range(5))
    assert data.class_counts.tolist() == [6] * 5
    parts = [paths(data, split) for split in ("train", "val", "test")]
    assert [len(part) for part in parts] == [30, 15, 15]
    assert len(set.union(*parts)) == 60
    again = ImageFolderData(str(photo_folder), val_share=0.25, test_share=0.25, num_workers=0)
    other = ImageFolderData(str(photo_folder), val_share=0.25, test_share=0.25, num_workers=0, seed=1)
    assert paths(again, "val") == parts[1] != paths(other, "val")


def test_folders_of_splits_are_taken_as_they_are(photo_folder, tmp_path):
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
    with pytest.raises(DataError, match="no test split"):
        data.setup("test")


def test_without_a_val_folder_some_training_images_are_kept_for_it(photo_folder, tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(photo_folder)
    data = ImageFolderData(str(tmp_path), val_share=0.25, test_share=0.5, num_workers=0)
    train, val, test = (paths(data, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (45, 15, 60)
    assert not train & val
    assert {path.parent.parent.name for path in train | val} == {"train"}
    assert {path.parent.parent.name for path in test} == {"test"}


def test_folders_that_disagree_are_named(photo_folder, tmp_path):
    (tmp_path / "train").symlink_to(photo_folder)
    (tmp_path / "val").mkdir()
    for number in range(4):
        (tmp_path / "val" / f"class{number}").symlink_to(photo_folder / f"class{number}")
    with pytest.raises(DataError, match="'class4' is missing from"):
        ImageFolderData(str(tmp_path))


def test_a_batch_keeps_boxes_masks_and_placements():
    data = ClutteredDigitsData(train_size=8, val_size=4, test_size=4, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    assert batch["box"].shape == (4, 4)
    assert batch["mask"].shape == (4, 64, 64)
    assert len(batch["placement"]) == len(batch["path"]) == 4
    assert -1 <= batch["image"].min() < batch["image"].max() <= 1


def test_workers_change_nothing():
    def epoch(num_workers):
        data = ClutteredDigitsData(train_size=12, batch_size=4, num_workers=num_workers)
        data.setup("fit")
        return torch.cat([batch["image"] for batch in data.train_dataloader()])

    assert torch.equal(epoch(0), epoch(2))


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10", "CIFAR100"])
def test_missing_files_of_torchvision_are_named(name, tmp_path):
    with pytest.raises(DataError, match=f"{name}; set download: true"):
        TorchvisionData(getattr(torchvision.datasets, name), str(tmp_path))


def test_mnist_is_read_from_its_own_files(tmp_path):
    """The format of the original files: two or four big-endian sizes, then bytes."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for part, count in (("train", 40), ("t10k", 10)):
        images = random.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % 10).astype(np.uint8)
        head = np.array([2051, count, 28, 28], ">i4").tobytes()
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(np.array([2049, count], ">i4").tobytes() + labels.tobytes())
    data = TorchvisionData(torchvision.datasets.MNIST, str(tmp_path), val_size=10, num_workers=0, batch_size=10)
    data.setup("fit")
    data.setup("test")
    train, val = ({sample["path"] for sample in data.datasets[split]} for split in ("train", "val"))
    assert len(train) == 30
    assert not train & val
    assert sorted(sample["label"] for sample in data.datasets["val"]) == list(range(10))  # stratified
    sample = data.datasets["test"][3]
    expected = images[3].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(sample["image"][0].numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(data.datasets["test"].read_source(sample["path"])[..., 0], images[3])
