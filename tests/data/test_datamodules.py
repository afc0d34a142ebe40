"""Test torchvision's data sets as data modules."""

import numpy as np
import pytest
import torchvision

from visionattn.data import TorchvisionData
from visionattn.data.listing import differences
from visionattn.errors import DataError


@pytest.mark.parametrize("name", ["FashionMNIST", "CIFAR10", "CIFAR100"])
def test_missing_torchvision_files_raise(name, tmp_path):
    with pytest.raises(DataError, match=f"{name}; set download: true"):
        TorchvisionData(getattr(torchvision.datasets, name), str(tmp_path))


def test_mnist_is_read_from_its_own_files(tmp_path):
    """The test writes MNIST's original format: big-endian integers (2049 or 2051, then the sizes), then the bytes."""
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
    assert sorted(sample["label"] for sample in data.datasets["val"]) == list(range(10))  # the same number per class
    sample = data.datasets["test"][3]
    expected = images[3].astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(sample["image"][0].numpy(), expected, atol=1e-6)
    np.testing.assert_array_equal(data.datasets["test"].read_source(sample["path"])[..., 0], images[3])
    listing = data.listing("train")
    assert set(listing) == train
    changed = TorchvisionData(torchvision.datasets.MNIST, str(tmp_path), val_size=10, num_workers=0)
    changed._train.data[:] = 255 - changed._train.data
    for split in ("train", "val"):
        assert differences({split: data.listing(split)}, {split: data.listing(split)}) == ""
        count = len(data.listing(split))
        assert f"{count} with other labels" in differences(
            {split: data.listing(split)}, {split: changed.listing(split)}
        )
