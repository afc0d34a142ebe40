"""Helpers shared by the readers of annotations. This file does not import torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionattn.data.annotations.boxes import Annotations, Entry, Problem
from visionattn.data.decode import SUFFIXES
from visionattn.data.placement import Size
from visionattn.errors import DataError, nearest

SPLITS = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": "test",
    "testing": "test",
}
"""Name of a split in file and folder names, in lower case → name of the split in this package."""
IMAGE_FOLDERS = ("images", "JPEGImages", "Images", "imgs", "")
"""Usual names of the folder of images; "" is the data set's own folder."""


def files_ending(folder: Path, suffix: str) -> list[Path]:
    """Return the files in a folder with this suffix, in upper or lower case; hidden files are skipped."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in there if file.suffix.lower() == suffix and not file.name.startswith(".")]


def pictures_in(place: Path, *, deep: bool = True) -> list[Path]:
    """Return the images in a folder (with `deep`, also in its sub-folders) or in a text file that lists images."""
    if place.is_file():
        lines = place.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        return [place.parent / line.strip() for line in lines if line.strip()]
    if not place.is_dir():
        return []
    files = sorted(place.rglob("*") if deep else place.iterdir())
    return [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def split_folders(root: Path) -> list[tuple[str, Path]]:
    """Return (split, folder) of each sub-folder that is named after a split, in upper or lower case."""
    names = (
        [path.name for path in root.iterdir() if path.name.lower() in SPLITS and path.is_dir()] if root.is_dir() else []
    )
    order = list(SPLITS)
    names.sort(key=lambda name: (order.index(name.lower()), name))
    return [(SPLITS[name.lower()], root / name) for name in names]


def chosen_names(class_names: Sequence[str] | None, by_name: Mapping[str, int], root: Path) -> tuple[str, ...]:
    """Return the chosen class names, or all names in the order of their numbers.

    Raises:
        DataError: a chosen name does not exist.
    """
    absent = [name for name in class_names or () if name not in by_name]
    if absent:
        raise DataError(f"{root} has no class {absent[0]!r}.{nearest(absent[0], by_name)}")
    return tuple(class_names or sorted(by_name, key=by_name.__getitem__))


def split_of(name: str) -> str | None:
    """Return the split that a file or folder name contains, e.g. train for `instances_train2017`, or None."""
    for part in name.lower().replace("-", "_").split("_"):
        for alias, split in SPLITS.items():
            if part.rstrip("0123456789") == alias:
                return split
    return None


def to_rows(values: Sequence[object]) -> NDArray[np.float64]:
    """Convert boxes to an (N, 4) array; a coordinate that is missing or not a number becomes NaN."""
    rows = [
        [to_number(value) for value in row] if isinstance(row, (list, tuple)) and len(row) == 4 else [math.nan] * 4
        for row in values
    ]
    return np.array(rows, np.float64).reshape(-1, 4)


def stated_size(height: object, width: object) -> Size | None:
    """Convert a size from a file to (height, width), or None if a side is missing or not a number."""
    sides = to_number(height), to_number(width)
    return (int(sides[0]), int(sides[1])) if np.isfinite(sides).all() else None


def to_number(value: object) -> float:
    """Convert a number, or text that holds a number, to float; other values become NaN."""
    try:
        return float(value)  # type: ignore[arg-type]  # float() raises TypeError for other types
    except (TypeError, ValueError):
        return math.nan


def to_whole(value: object) -> int | None:
    """Convert an id in a COCO file to int; some tools write ids as text. Other values become None."""
    if isinstance(value, int):  # do not convert to float, which cannot hold all integers above 2⁵³
        return value
    number = to_number(value)
    return int(number) if number.is_integer() else None


def resplit(annotations: Annotations, files: Mapping[str, Path]) -> Annotations:
    """Assign the entries to splits according to split files.

    Args:
        annotations: the entries.
        files: split → text file; each line names an image.

    Raises:
        DataError: a split file is missing, or one of its lines matches two images.
    """
    by_name: dict[str, list[Entry]] = {}
    for entry in (entry for entries in annotations.splits.values() for entry in entries):
        name = Path(entry.path.name if entry.path else entry.where.partition(", ")[2] or entry.where)
        for text in {name.name, name.stem}:
            by_name.setdefault(text, []).append(entry)
    splits: dict[str, list[Entry]] = {}
    for split, file in files.items():
        if not file.is_file():
            raise DataError(f"there is no split file {file}")
        splits[split] = []
        for line in file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines():
            # try the whole line first, since names may contain spaces; Pascal VOC writes 1 or -1 after the name
            texts = [line.strip(), *line.rsplit(None, 1)[:1]] if line.strip() else []
            known = next((matches for text in texts if (matches := _matching(text, by_name))), [])
            if len(known) > 1:
                first, second = (entry.path or entry.where for entry in known[:2])
                raise DataError(f"{file}: {texts[0]} may be {first} or {second}; write the folder before the name")
            splits[split] += known
            if texts and not known:
                annotations.problems.append(Problem("not annotated", file.name, texts[0]))
    return Annotations(
        splits, annotations.class_names, annotations.category_ids, annotations.box_format, annotations.problems
    )


def _matching(text: str, by_name: Mapping[str, list[Entry]]) -> list[Entry]:
    """Return the entries that match a line of a split file."""
    path = Path(text.replace("\\", "/"))
    bare = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    named = by_name.get(path.name) or by_name.get(bare.name, [])
    folders = bare.parent.parts
    in_folder = [entry for entry in named if entry.path and entry.path.parent.parts[-len(folders) :] == folders]
    return in_folder if len(named) > 1 and folders and in_folder else named
