"""Lists of the images in a split, which a checkpoint holds, so that a resume notices other data.

A listing maps the name of each image to its item.
"""

import hashlib
import os
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
from torch import Tensor

_SHOWN = 3  # names of each kind in a message


class Item(NamedTuple):
    """An image of a split.

    Attributes:
        size: of the file, in bytes; −1 if unknown.
        annotation: hash of the label, or of the boxes and their labels.
    """

    size: int
    annotation: int


Listing: TypeAlias = dict[str, Item]


PackedListing: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""A listing as tensors, which fit into a checkpoint: the compressed names, uint8; sizes and annotations, (N,) int64."""


def item_of(path: Path, *annotation: bytes) -> Item:
    """Return the item of an image file; reads only the size of the file."""
    try:
        size = os.stat(path).st_size
    except OSError:
        size = -1
    return Item(size, hash_of(*annotation))


def hash_of(*parts: bytes) -> int:
    """Return a signed hash of 64 bits."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "big", signed=True)


def name_below(path: Path, folders: Iterable[Path]) -> str:
    """Return a path relative to the first of the folders that holds it; otherwise the absolute path."""
    for folder in folders:
        if path.is_relative_to(folder):
            return path.relative_to(folder).as_posix()
    return str(path.absolute())


def pack(listing: Listing) -> PackedListing:
    """Convert a listing to tensors."""
    text = "\0".join(listing).encode("utf-8", "surrogateescape")
    names = torch.from_numpy(np.frombuffer(zlib.compress(text), np.uint8).copy())
    sizes, annotations = (torch.tensor([item[part] for item in listing.values()], dtype=torch.int64) for part in (0, 1))
    return names, sizes, annotations


def unpack(packed: PackedListing) -> Listing:
    """Convert tensors of `pack` to a listing."""
    names, sizes, annotations = packed
    text = zlib.decompress(names.numpy().tobytes()).decode("utf-8", "surrogateescape")
    items = map(Item, sizes.tolist(), annotations.tolist())
    return dict(zip(text.split("\0") if text else [], items, strict=True))


def differences(saved: Mapping[str, Listing], now: Mapping[str, Listing]) -> str:
    """Describe how the images of two data sets differ, as text: `1 removed (a.jpg), 2 added (b.jpg, c.jpg)`.

    Args:
        saved: split → listing of the data of a checkpoint.
        now: the same splits of the present data.

    Returns:
        The text; "" if the data is the same.
    """
    before, after = (set().union(*splits.values()) for splits in (saved, now))
    moved, annotated, sized = set[str](), set[str](), set[str]()
    for split, listing in saved.items():
        found = now.get(split, {})
        moved |= (listing.keys() - found.keys()) & after
        for name in listing.keys() & found.keys():
            if listing[name].annotation != found[name].annotation:
                annotated.add(name)
            elif listing[name].size != found[name].size:
                sized.add(name)
    kinds = {
        "removed": before - after,
        "added": after - before,
        "in another split": moved,
        "with other labels or boxes": annotated,
        "with another file size": sized,
    }
    return ", ".join(
        f"{len(names)} {kind} ({', '.join(sorted(names)[:_SHOWN])}{', …' if len(names) > _SHOWN else ''})"
        for kind, names in kinds.items()
        if names
    )
