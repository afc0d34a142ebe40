"""Helpers shared by the readers of annotations; no torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from visionattn.data.annotations.boxes import Annotations, Entry, Problem
from visionattn.data.decode import SUFFIXES
from visionattn.data.placement import Size
from visionattn.errors import DataError, nearest

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""File or folder name of a split → split."""
IMAGE_FOLDERS = ("images", "JPEGImages", "Images", "imgs", "")
"""Usual names of the folder of images."""


def files_ending(folder: Path, suffix: str) -> list[Path]:
    """Return the files of a folder with a suffix, in upper or lower case; hidden files are skipped."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in there if file.suffix.lower() == suffix and not file.name.startswith(".")]


def pictures_in(place: Path, *, deep: bool = True) -> list[Path]:
    """Return the images of a folder (if `deep`, of its sub-folders too), or the images that a text file lists."""
    if place.is_file():
        lines = place.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        return [place.parent / line.strip() for line in lines if line.strip()]
    if not place.is_dir():
        return []
    files = sorted(place.rglob("*") if deep else place.iterdir())
    return [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


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
    """Return the split in the name of a file or folder, such as `instances_train2017`, or None."""
    for part in name.lower().replace("-", "_").split("_"):
        for alias, split in SPLITS.items():
            if part.rstrip("0123456789") == alias:
                return split
    return None


def to_rows(values: Sequence[object]) -> NDArray[np.float64]:
    """Convert boxes to an (N, 4) array; NaN where a coordinate is missing or not a number."""
    rows = [
        [to_number(value) for value in row] if isinstance(row, (list, tuple)) and len(row) == 4 else [math.nan] * 4
        for row in values
    ]
    return np.array(rows, np.float64).reshape(-1, 4)


def stated_size(height: object, width: object) -> Size | None:
    """Return the size stated in a file, or None where height or width is missing or not a number."""
    sides = to_number(height), to_number(width)
    return (int(sides[0]), int(sides[1])) if np.isfinite(sides).all() else None


def to_number(value: object) -> float:
    """Convert a number, or the text of one, to float; NaN where that fails."""
    try:
        return float(value)  # type: ignore[arg-type]  # other types raise the TypeError below
    except (TypeError, ValueError):
        return math.nan


def to_whole(value: object) -> int | None:
    """Convert a COCO number, which some tools write as text, to int; None where that fails."""
    if isinstance(value, int):  # not converted to float, which cannot hold all integers above 2⁵³
        return value
    number = to_number(value)
    return int(number) if number.is_integer() else None


def resplit(annotations: Annotations, files: Mapping[str, Path]) -> Annotations:
    """Divide the entries into the splits that split files list.

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
            # names may contain spaces, and Pascal VOC writes 1 or -1 after the name
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
