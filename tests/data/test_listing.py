"""Test the lists of images that a checkpoint holds."""

from pathlib import Path

import torch

from visionattn.data.listing import Item, differences, hash_of, item_of, name_below, pack, unpack

LISTING = {f"cat/{number}.jpg": Item(1000 + number, hash_of(b"cat")) for number in range(5)}


def changed(**listings):
    """Describe the differences from a checkpoint whose images 0 to 3 are for training and 4 is for validation."""
    saved = {"train": dict(list(LISTING.items())[:4]), "val": dict(list(LISTING.items())[4:])}
    return differences(saved, {**saved, **listings})


def test_a_listing_is_restored_from_a_checkpoint(tmp_path):
    odd = {**LISTING, "b\udcffd \n.jpg": Item(-1, -(2**63)), "é/ü.png": Item(2**40, 2**63 - 1)}
    for listing in (odd, {}):
        torch.save(pack(listing), tmp_path / "x.pt")
        restored = unpack(torch.load(tmp_path / "x.pt", weights_only=True))
        assert restored == listing
        assert list(restored) == list(listing)


def test_a_large_listing_takes_few_bytes():
    listing = {f"n0{n % 1000:07d}/n0{n % 1000:07d}_{n}.JPEG": Item(n, n) for n in range(20_000)}
    assert sum(part.nbytes for part in pack(listing)) < 24 * len(
        listing
    )  # bytes; the size and the hash of an item take 16


def test_differences_are_named():
    train = dict(list(LISTING.items())[:4])
    assert changed() == ""
    assert changed(train=dict(reversed(train.items()))) == ""
    assert changed(train={**train, "new.jpg": Item(1, 1)}) == "1 added (new.jpg)"
    without = {name: item for name, item in train.items() if name != "cat/2.jpg"}
    assert changed(train=without) == "1 removed (cat/2.jpg)"
    assert changed(train={}) == "4 removed (cat/0.jpg, cat/1.jpg, cat/2.jpg, …)"
    moved = changed(train=without, val={**dict(list(LISTING.items())[4:]), "cat/2.jpg": LISTING["cat/2.jpg"]})
    assert moved == "1 in another split (cat/2.jpg)"
    relabelled = {**train, "cat/0.jpg": Item(1000, hash_of(b"dog")), "cat/1.jpg": Item(7, hash_of(b"cat"))}
    assert changed(train=relabelled) == (
        "1 with other labels or boxes (cat/0.jpg), 1 with another file size (cat/1.jpg)"
    )


def test_an_item_has_the_size_of_the_file_and_depends_on_each_part(tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"12345")
    assert item_of(tmp_path / "a.jpg", b"x").size == 5
    assert item_of(tmp_path / "gone.jpg", b"x").size == -1
    assert len({hash_of(b"ab", b"c"), hash_of(b"a", b"bc"), hash_of(b"abc"), hash_of(b"abc", b"")}) == 4


def test_names_are_relative_to_the_folder_of_the_data():
    assert name_below(Path("root/cat/1.jpg"), [Path("root")]) == "cat/1.jpg"
    assert name_below(Path("/images/1.jpg"), [Path("/root"), Path("/images")]) == "1.jpg"
    assert name_below(Path("/elsewhere/1.jpg"), [Path("/root")]) == "/elsewhere/1.jpg"
