"""Images in folders, with a sub-folder for each class."""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionattn.data.decode import SUFFIXES, read_image
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Sample, Transform, prepare
from visionattn.errors import DataError, nearest
from visionattn.files import natural_key


class ImageFolder(Dataset[Sample]):
    """Image files with their labels; the key of a sample is its index, or (index, seed of the augmentation).

    Args:
        files: (path, label) of each image; the label is the number of its class, or (K,) float32 of 0 and 1.
        preprocess: resizes and normalises each image.
        augment: changes each image before `preprocess` (default: no change).
    """

    def __init__(
        self,
        files: Sequence[tuple[Path, int | NDArray[np.float32]]],
        *,
        preprocess: Preprocess,
        augment: Transform | None = None,
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

    Hidden files and folders are skipped. Links to images and to class folders are followed. Links to folders inside a
    class folder are not followed, since they could form a cycle.

    Raises:
        DataError: the folder does not exist or has no sub-folders, or a sub-folder has no image.
    """
    if not folder.is_dir():
        siblings = [entry.name for entry in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise DataError(f"there is no folder {folder}.{nearest(folder.name, siblings)}")
    classes = {path.name: _images(path) for path in sub_folders(folder)}
    if not classes:
        raise DataError(f"{folder} has no sub-folders; the images of each class must be in a sub-folder of their own")
    empty = [name for name, images in classes.items() if not images]
    if empty:
        raise DataError(
            f"the class {empty[0]!r} is empty: {folder / empty[0]} holds no image; add images or remove the folder"
        )
    return classes


def sub_folders(folder: Path) -> list[Path]:
    """Return the sub-folders of a folder and links to folders, in natural order; hidden folders are skipped."""
    return [folder / name for name in sorted(_entries(folder, folders=True), key=natural_key)]


def _images(folder: Path) -> list[Path]:
    found = [folder / name for name in _entries(folder, folders=False) if Path(name).suffix.lower() in SUFFIXES]
    for name in _entries(folder, folders=True, links=False):
        found += _images(folder / name)
    return sorted(found, key=lambda path: natural_key(str(path)))


def _entries(folder: Path, *, folders: bool, links: bool = True) -> list[str]:
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if not entry.name.startswith(".")
            and (entry.is_dir(follow_symlinks=links) if folders else entry.is_file(follow_symlinks=links))
        ]
