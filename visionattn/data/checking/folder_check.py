"""Check a folder of images with a sub-folder for each class."""

import os
from pathlib import Path

import numpy as np

from visionattn.data.annotations.boxes import Annotated, Problem
from visionattn.data.annotations.checks import Progress, Report, decoded_sizes, twins
from visionattn.data.annotations.coco import coco_files
from visionattn.data.annotations.parsing import SPLITS, pictures_in
from visionattn.data.annotations.reading import layout_of
from visionattn.data.image_folder import find_classes
from visionattn.data.placement import Size
from visionattn.errors import DataError
from visionattn.files import printable


def has_classes(root: str | os.PathLike[str]) -> bool:
    """Return whether a folder has no annotations, but images in sub-folders; a .json without boxes is no annotation."""
    try:
        if layout_of(Path(root)) != "coco" or any(
            b'"annotations"' in file.read_bytes() for file in coco_files(Path(root))
        ):
            return False
    except DataError:
        pass
    return Path(root).is_dir() and any(pictures_in(folder) for folder in Path(root).iterdir() if folder.is_dir())


def check_folder(
    root: str | os.PathLike[str], *, progress: Progress[tuple[Path, Size | DataError]] | None = None
) -> Report:
    """Check a folder in the layout of `ImageFolderData`: damaged images, duplicates, leaks and missing classes.

    Every image file is decoded in full.

    Args:
        root: the folder, which holds train/, val/ and test/, or the folders of the classes.
        progress: shows how many image files are decoded (default: nothing is shown).

    Raises:
        DataError: the folder is missing or has no classes, or a class is empty.
    """
    root = Path(root)
    if not root.is_dir():
        raise DataError(f"there is no folder {printable(root)}")
    folders = {entry.name: entry for entry in sorted(root.iterdir()) if entry.is_dir() and entry.name.lower() in SPLITS}
    if "train" not in {SPLITS[name.lower()] for name in folders}:
        folders = {"": root}
    classes = {split: find_classes(folder) for split, folder in folders.items()}
    names = tuple(dict.fromkeys(name for by_name in classes.values() for name in by_name))
    sizes = decoded_sizes(
        [path for by_name in classes.values() for paths in by_name.values() for path in paths], progress
    )
    problems = []
    splits: dict[str, list[Annotated]] = {}
    for split, by_name in classes.items():
        missing = [name for name in names if name not in by_name]
        problems += [Problem("missing class", name, f"in {folders[split]}") for name in missing]
        splits[split] = []
        for name, paths in by_name.items():
            for path in paths:
                size = sizes[path]
                if isinstance(size, DataError):
                    problems.append(Problem("unreadable image", str(path.relative_to(root)), str(size)))
                    continue
                label = np.array([names.index(name)], np.int64)
                none = np.zeros(0)
                splits[split].append(Annotated(path, size, np.zeros((0, 4)), label, none.astype(bool), none, 0))
    problems += twins([(split, image.path) for split, images in splits.items() for image in images])
    return Report("folder", names, splits, problems)
