"""Images in folders, with a sub-folder for each class."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionattn.data.decode import SUFFIXES, read_image
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Sample, Transform, prepare
from visionattn.errors import DataError, nearest


class ImageFolder(Dataset[Sample]):
    """Images with their labels.

    The key of a sample is its index, or (index, seed of the augmentation).

    Args:
        files: (path, label) of each image.
        preprocess: resizes and normalises each image.
        augment: changes each image first (default: no change).
    """

    def __init__(
        self, files: Sequence[tuple[Path, int]], *, preprocess: Preprocess, augment: Transform | None = None
    ) -> None:
        self.files = files
        self.preprocess = preprocess
        self.augment = augment

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, key: int | tuple[int, int]) -> Sample:
        index, seed = key if isinstance(key, tuple) else (key, key)
        path, label = self.files[index]
        sample = prepare(read_image(path), self.preprocess, self.augment, seed)
        sample["label"], sample["path"] = label, str(path)
        return sample

    def path_of(self, index: int) -> str:
        """Return the path of a sample."""
        return str(self.files[index][0])

    def read_source(self, path: str) -> NDArray[np.uint8]:
        """Read the image file of the sample with this path, before preprocessing: (H, W, 3) uint8 RGB."""
        return read_image(path)


def find_classes(folder: Path) -> dict[str, list[Path]]:
    """Find the images of each class: name of the sub-folder → its images, both in natural order (2 before 10).

    Hidden files and folders are skipped. Links to images and to class folders are followed; links to folders inside a
    class are not, since they could form a cycle.

    Raises:
        DataError: the folder does not exist or has no sub-folders, or a sub-folder has no image.
    """
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise DataError(f"there is no folder {folder}.{nearest(folder.name, siblings)}")
    classes = {name: _images(folder / name) for name in _natural(_entries(folder, folders=True))}
    if not classes:
        raise DataError(f"{folder} holds no sub-folders; it needs one for each class, with the images of that class")
    empty = [name for name, images in classes.items() if not images]
    if empty:
        raise DataError(
            f"the class {empty[0]!r} is empty: {folder / empty[0]} holds no image; add some or remove the folder"
        )
    return classes


def _images(folder: Path) -> list[Path]:
    found = [folder / name for name in _entries(folder, folders=False) if Path(name).suffix.lower() in SUFFIXES]
    for name in _entries(folder, folders=True, links=False):
        found += _images(folder / name)
    return sorted(found, key=lambda path: _natural_key(str(path)))


def _entries(folder: Path, *, folders: bool, links: bool = True) -> list[str]:
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and (entry.is_dir(follow_symlinks=links) if folders else entry.is_file(follow_symlinks=links))
        ]


def _natural(names: Sequence[str]) -> list[str]:
    return sorted(names, key=_natural_key)


def _natural_key(name: str) -> list[tuple[int, int | str]]:
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name) if part]
