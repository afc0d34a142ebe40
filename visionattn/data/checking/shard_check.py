"""Check images in tar files (shards)."""

import hashlib
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

import numpy as np

from visionattn.data.annotations.boxes import Annotated, Problem
from visionattn.data.annotations.checks import Progress, Report, twins
from visionattn.data.annotations.parsing import SPLITS
from visionattn.data.checking.folder_check import has_classes
from visionattn.data.classes import class_index, class_names_in
from visionattn.data.decode import decode_image
from visionattn.data.placement import Size
from visionattn.data.shards import REMEDY, Member, Shard, find_shards, open_shard
from visionattn.errors import DataError
from visionattn.files import local_path, natural_key

_Sample = tuple[Path, str, "Size | DataError", bytes]
"""Path of a sample's image, text of its class, (height, width) of the image or the error of reading it, and a hash."""


def has_shards(where: str) -> bool:
    """Return whether a path names shards: a .tar file, a pattern or an index of them, or a folder with .tar files."""
    if not os.path.isdir(where):
        return where.endswith((".tar", ".json"))
    return any(Path(where).glob("*.tar")) and not has_classes(where)  # not an archive that lies beside its images


def check_shards(
    where: str,
    *,
    class_names: list[str] | str | None = None,
    progress: Progress[tuple[str, list[_Sample] | DataError]] | None = None,
) -> Report:
    """Check shards: damaged files and images, unknown classes, duplicates, leaks and missing classes.

    Every image is decoded in full. The first word of a shard's file name is its split if it is the name of one, as in
    train-000.tar.

    Args:
        where: a .tar file, a pattern of such files, a .json index (see `find_shards`), or a folder of .tar files.
        class_names: as for `ShardData` (default: the texts in the .cls files, in natural order).
        progress: shows how many shards are checked (default: nothing is shown).

    Raises:
        UsageError: `where` is an address.
        DataError: there are no shards, or no class names.
    """
    known = None if class_names is None else class_names_in(class_names)
    shards = _found(local_path(where))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results: Iterable[tuple[str, list[_Sample] | DataError]] = (
            (path, _samples(path, count, pool)) for path, count in shards
        )
        read = dict(progress(results, len(shards)) if progress else results)
    names = known or sorted(
        {text for samples in read.values() if isinstance(samples, list) for _, text, _, _ in samples}, key=natural_key
    )
    problems: list[Problem] = []
    splits: dict[str, list[Annotated]] = {}
    hashes: dict[str, list[bytes]] = {}  # of the images of each split
    for shard, samples in read.items():
        split = _split(shard)
        images, found = splits.setdefault(split, []), hashes.setdefault(split, [])
        if isinstance(samples, DataError):
            problems.append(Problem("unreadable shard", shard, str(samples)))
            continue
        for path, text, size, content in samples:
            if isinstance(size, DataError):
                problems.append(Problem("unreadable image", str(path), str(size).removeprefix(f"{path}: ")))
                continue
            try:
                number = names.index(text) if known is None else class_index(text, names, remedy=REMEDY)
            except DataError as error:
                problems.append(Problem("unknown class", str(path), str(error)))
                continue
            none = np.zeros(0)
            label = np.array([number], np.int64)
            images.append(Annotated(path, size, np.zeros((0, 4)), label, none.astype(bool), none, 0))
            found.append(content)
    for split, images in splits.items():
        there = {int(image.labels[0]) for image in images}
        missing = [name for number, name in enumerate(names) if number not in there]
        problems += [Problem("missing class", name, f"in {split or 'all shards'}") for name in missing]
    pairs = [(split, image.path) for split, images in splits.items() for image in images]
    problems += twins(pairs, [content for split in splits for content in hashes[split]])
    return Report("shards", tuple(names), splits, problems)


def _found(where: str) -> list[tuple[str, int | None]]:
    """Return the shards, and the number of samples of each if an index says it."""
    if where.endswith(".json"):
        return list(find_shards(where))
    paths = sorted(map(str, Path(where).glob("*.tar")) if os.path.isdir(where) else glob(where, recursive=True))
    if not paths:
        raise DataError(f"no file matches {where}")
    return [(path, None) for path in paths]


def _samples(path: str, count: int | None, pool: ThreadPoolExecutor) -> list[_Sample] | DataError:
    """Read and decode the samples of a shard; return its error if it cannot be read."""
    try:
        shard = Shard(open_shard(path), path)
    except DataError as error:
        return error
    if count not in (None, len(shard.samples)):
        return DataError(f"{path} has {len(shard.samples)} samples, and the index says {count}")

    def read(members: tuple[Member, Member]) -> _Sample:
        image, text = members
        name, content = f"{path}/{image.name}", shard.content(image)
        size: Size | DataError
        try:
            height, width, _ = decode_image(content, name).shape
            size = height, width
        except DataError as error:
            size = error
        label = shard.content(text).decode("utf-8", "replace").strip()
        return Path(name), label, size, hashlib.blake2b(content).digest()

    return list(pool.map(read, shard.samples))


def _split(shard: str) -> str:
    """Return the split that the first word of a shard's file name means; "" if it is no split."""
    return SPLITS.get(re.split(r"[^A-Za-z]", os.path.basename(shard))[0].lower(), "")
