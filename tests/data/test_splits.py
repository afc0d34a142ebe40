"""Test the splits that a hash of the names draws."""

import hashlib

import pytest

from tests.refusals import refuses
from visionattn.data.splits import draw_splits
from visionattn.errors import DataError

NAMES = [f"IMG_{number:04d}.jpg" for number in range(1000)]


def drawn(names=NAMES, val=0.15, test=0.2, seed=0):
    """Return name → split."""
    parts = draw_splits(names, val=val, test=test, seed=seed, where="the folder")
    splits = {names[index]: split for split, part in parts.items() for index in part}
    assert len(splits) == len(names) == sum(map(len, parts.values()))
    return splits


def test_a_split_is_a_range_of_the_hash():
    for name, split in drawn().items():
        number = int(hashlib.blake2b(f"0/{name}".encode(), digest_size=8).hexdigest(), 16) / 2**64
        assert split == ("test" if number < 0.2 else "val" if number < 0.35 else "train")


@pytest.mark.parametrize("removed", [NAMES[:1], NAMES[500:501], NAMES[::2], NAMES[:900]])
def test_an_image_keeps_its_split_when_others_are_added_or_removed(removed):
    """So a test image is never a training image of an earlier checkpoint."""
    fewer = [name for name in NAMES if name not in removed]
    splits, before = drawn(fewer[::-1]), drawn()
    assert splits == {name: before[name] for name in fewer}


def test_another_seed_or_fraction_gives_other_splits():
    assert drawn(seed=1) != drawn()
    splits, before = drawn(val=0.3), drawn()
    assert {name for name in NAMES if splits[name] == "test"} == {name for name in NAMES if before[name] == "test"}
    assert {name for name in NAMES if splits[name] == "train"} < {name for name in NAMES if before[name] == "train"}


@pytest.mark.parametrize(("val", "test"), [(0.01, 0.01), (0.98, 0.01), (0.01, 0.98), (0.3, 0.3)])
@pytest.mark.parametrize("count", [3, 4, 10])
def test_no_split_of_a_few_images_is_empty(count, val, test):
    for seed in range(20):
        assert set(drawn(NAMES[:count], val, test, seed).values()) == {"train", "val", "test"}


def test_without_a_test_fraction_there_are_no_test_images():
    assert set(drawn(NAMES[:2], test=0).values()) == {"train", "val"}
    refuses(DataError, "the folder has 1 images, too few to split", drawn, NAMES[:1], test=0)
    refuses(DataError, "the folder has 2 images, too few to split", drawn, NAMES[:2])


def test_accents_are_equal_however_the_file_system_stores_them():
    composed = [f"caf\u00e9{number}.jpg" for number in range(50)]
    decomposed = [f"cafe\u0301{number}.jpg" for number in range(50)]
    assert list(drawn(composed).values()) == list(drawn(decomposed).values())
