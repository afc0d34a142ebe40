"""Test the cluttered digits: reproducible images, disjoint splits, correct boxes."""

import hashlib
import pickle
import subprocess
import sys

import numpy as np
import pytest
import torch

from visionattn.data import ClutteredDigits

DIGEST = """
import hashlib
from visionattn.data import ClutteredDigits
data = ClutteredDigits("train", size=50, seed=3)
print(hashlib.sha256(b"".join(data[i]["image"].numpy().tobytes() for i in (7, 3))).hexdigest())
"""


def test_image_depends_on_seed_and_index_only():
    data = ClutteredDigits("train", size=50, seed=3)
    digest = hashlib.sha256(b"".join(data[i]["image"].numpy().tobytes() for i in (7, 3))).hexdigest()
    other = subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True).stdout
    assert other.strip() == digest
    small, large = (ClutteredDigits("train", size=size, seed=3) for size in (8, 5000))
    assert torch.equal(small[7]["image"], large[7]["image"])
    assert not torch.equal(ClutteredDigits("train", size=8, seed=4)[7]["image"], small[7]["image"])


def test_no_handwritten_instance_is_in_two_splits():
    from sklearn.datasets import load_digits

    whole = {image.tobytes() for image in load_digits().images}
    splits = [ClutteredDigits(split, size=1).instances[0] for split in ("train", "val", "test")]
    found = [{image.tobytes() for image in images} for images in splits]
    assert sum(map(len, splits)) == 1797
    assert sum(map(len, found)) == len(found[0] | found[1] | found[2]) == len(whole)


def test_box_and_mask_match_the_ink_of_the_digit():
    data = ClutteredDigits("val", size=40)
    bare = ClutteredDigits("val", size=40, fragments=0)
    for index in range(40):
        sample = data[index]
        mask = sample["mask"].numpy()
        rows, columns = np.nonzero(mask)
        box = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
        assert sample["box"].tolist() == box
        assert (data.read_source(sample["path"])[mask] > 64).all()
    picture = bare.read_source(bare[0]["path"])[..., 0]
    np.testing.assert_array_equal(bare[0]["mask"].numpy(), picture > 64)  # without clutter all ink belongs to the digit


def test_labels_match_the_handwriting():
    """For at least 90 of 100 digits without clutter, the nearest training instance has the same label."""
    data = ClutteredDigits("test", size=100, fragments=0, scale=(32, 32), distort=0)
    images, labels = ClutteredDigits("train", size=1).instances
    images = images.reshape(-1, 8, 4, 8, 4).mean((2, 4))
    correct = 0
    for index in range(100):
        sample = data[index]
        x0, y0 = (int(edge) for edge in sample["box"][:2])
        candidates = []  # (distance, label) of the nearest instance, for several positions around the box
        picture = data.read_source(sample["path"])[..., 0].astype(float)
        for dy in range(-4, 1):
            for dx in range(-12, 1):
                top, left = y0 + dy, x0 + dx
                if 0 <= top <= 32 and 0 <= left <= 32:
                    cut = picture[top : top + 32, left : left + 32].reshape(8, 4, 8, 4).mean((1, 3))
                    distance = ((images - cut) ** 2).sum((1, 2))
                    candidates.append((distance.min(), labels[distance.argmin()]))
        correct += min(candidates)[1] == sample["label"]
    assert correct >= 90


def test_invalid_arguments_raise():
    for options in (
        {"split": "dev"},
        {"scale": (40, 20)},
        {"scale": (22, 90)},
        {"fragment_size": 30},
        {"distort": 0.6},
    ):
        with pytest.raises(ValueError, match=next(iter(options))):
            ClutteredDigits(**{"split": "train", "size": 1, **options})
    with pytest.raises(IndexError):
        ClutteredDigits("train", size=1).draw(1)


def test_changing_a_sample_does_not_change_the_cached_image(monkeypatch):
    monkeypatch.setattr("visionattn.data.synthetic.cluttered_digits.REMEMBERED", 2)
    data, unchanged = ClutteredDigits("train", size=4), ClutteredDigits("train", size=4)
    for index in (0, 1, 2, 3, 2, 1):
        sample = data[index]
        sample["image"] += 1
        sample["mask"][:] = True
    for index in range(4):
        for key in ("image", "mask"):
            assert torch.equal(data[index][key], unchanged[index][key])
    assert len(pickle.loads(pickle.dumps(data))) == 4  # worker processes get a pickled copy
