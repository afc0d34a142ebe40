"""What the readers of annotations share; no torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionattn.data.annotations.boxes import Annotations, Entry, Problem
from visionattn.data.decode import SUFFIXES
from visionattn.data.placement import Size
from visionattn.errors import DataError, nearest

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What files and folders call a split → its name."""
IMAGE_FOLDERS = ("images", "JPEGImages", "Images", "imgs", "")
"""What the folder of the images is called."""


def files_ending(folder: Path, suffix: str) -> list[Path]:
    """The files of a folder that end so, in either case; hidden ones are none of the user's."""
    there = sorted(folder.iterdir()) if folder.is_dir() else []
    return [file for file in there if file.suffix.lower() == suffix and not file.name.startswith(".")]


def pictures_in(place: Path, *, deep: bool = True) -> list[Path]:
    """The images of a folder, or those that a text file lists."""
    if place.is_file():
        lines = place.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines()
        return [place.parent / line.strip() for line in lines if line.strip()]
    if not place.is_dir():
        return []
    files = sorted(place.rglob("*") if deep else place.iterdir())
    return [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def chosen_names(class_names: Sequence[str] | None, by_name: Mapping[str, int], root: Path) -> tuple[str, ...]:
    """The names that are wanted, or all in the order of their numbers."""
    absent = [name for name in class_names or () if name not in by_name]
    if absent:
        raise DataError(f"{root} has no class {absent[0]!r}.{nearest(absent[0], by_name)}")
    return tuple(class_names or sorted(by_name, key=by_name.__getitem__))


def split_of(name: str) -> str | None:
    """The split that the name of a file or folder tells, as `instances_train2017`."""
    for part in name.lower().replace("-", "_").split("_"):
        for alias, split in SPLITS.items():
            if part.rstrip("0123456789") == alias:
                return split
    return None


def to_rows(values: Sequence[Any]) -> NDArray[np.float64]:
    """(N, 4); NaN for what is no number or missing."""
    rows = [
        [to_number(value) for value in row] if isinstance(row, (list, tuple)) and len(row) == 4 else [math.nan] * 4
        for row in values
    ]
    return np.array(rows, np.float64).reshape(-1, 4)


def stated_size(height: Any, width: Any) -> Size | None:
    """The size that a file says, where it says one."""
    sides = to_number(height), to_number(width)
    return (int(sides[0]), int(sides[1])) if np.isfinite(sides).all() else None


def to_number(value: Any) -> float:
    """The number that a value is or writes; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def to_whole(value: Any) -> int | None:
    """A number of COCO's, which some tools write as text; None for what is none."""
    if isinstance(value, int):  # as it is: those past 2⁵³ are no floats
        return value
    number = to_number(value)
    return int(number) if number.is_integer() else None


def resplit(found: Annotations, files: Mapping[str, Path]) -> Annotations:
    """Divide the entries as split files say."""
    by_name: dict[str, list[Entry]] = {}
    for entry in (entry for entries in found.splits.values() for entry in entries):
        name = Path(entry.path.name if entry.path else entry.where.partition(", ")[2] or entry.where)
        for text in {name.name, name.stem}:
            by_name.setdefault(text, []).append(entry)
    splits: dict[str, list[Entry]] = {}
    for split, file in files.items():
        if not file.is_file():
            raise DataError(f"there is no split file {file}")
        splits[split] = []
        for line in file.read_text(encoding="utf-8-sig", errors="surrogateescape").splitlines():
            # names may hold blanks, and Pascal VOC writes 1 or -1 behind them
            texts = [line.strip(), *line.rsplit(None, 1)[:1]] if line.strip() else []
            known = next((some for text in texts if (some := _meant(text, by_name))), [])
            if len(known) > 1:
                one, other = (entry.path or entry.where for entry in known[:2])
                raise DataError(f"{file}: {texts[0]} may be {one} or {other}; write the folder before the name")
            splits[split] += known
            if texts and not known:
                found.problems.append(Problem("not annotated", file.name, texts[0]))
    return Annotations(splits, found.class_names, found.category_ids, found.box_format, found.problems)


def _meant(text: str, by_name: Mapping[str, list[Entry]]) -> list[Entry]:
    """The entries that a line of a split file may mean."""
    path = Path(text.replace("\\", "/"))
    bare = path.with_suffix("") if path.suffix.lower() in SUFFIXES else path
    some = by_name.get(path.name) or by_name.get(bare.name, [])
    folders = bare.parent.parts
    fit = [entry for entry in some if entry.path and entry.path.parent.parts[-len(folders) :] == folders]
    return fit if len(some) > 1 and folders and fit else some
