"""Read YOLO's .txt annotation files. This file does not import torch."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from visionattn.data.annotations.boxes import Annotations, Entry, Problem
from visionattn.data.annotations.parsing import (
    SPLITS,
    chosen_names,
    files_ending,
    pictures_in,
    split_folders,
    to_number,
    to_rows,
    to_whole,
)
from visionattn.errors import DataError


def yaml_of(root: Path) -> dict[str, Any] | None:
    """Return the content of the first .yaml file with the key `names`, or None.

    Args:
        root: a folder, whose .yaml and .yml files are tried in order, or a single file.
    """
    for file in [root] if root.is_file() else [*files_ending(root, ".yaml"), *files_ending(root, ".yml")]:
        try:
            content = yaml.safe_load(file.read_bytes())
        except (yaml.YAMLError, UnicodeDecodeError, OSError):
            continue
        if isinstance(content, dict) and "names" in content:
            return content
    return None


def read_yolo(root: Path, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    """Read a folder or a .yaml file in YOLO's layout; see `read_annotations`.

    Raises:
        DataError: the .yaml has no names, the names have a wrong form, or there are no images.
    """
    content = yaml_of(root)
    if content is None and root.is_file():
        raise DataError(f"{root} is not the .yaml file of a YOLO data set: it has no key `names`")
    home = root.parent if root.is_file() else root
    known = _yolo_names(root, content["names"] if content else None)
    folders = {split: paths for split, paths in _yolo_images(home, content or {}, images).items() if paths}
    if not folders:
        raise DataError(f"{root} has labels, but no images were found; set images: to the folder of the images")
    problems: list[Problem] = []
    labels = {
        split: [
            (path, file, _yolo_lines(file, problems)) for path, file in zip(paths, map(_label_file, paths), strict=True)
        ]
        for split, paths in folders.items()
    }
    if known:
        by_name = {name: number for number, name in sorted(known.items())}
        names = chosen_names(class_names, by_name, root)
        ids = [by_name[name] for name in names]
        numbers = {number: names.index(name) for number, name in known.items() if name in names}
    elif class_names:
        names, ids = tuple(class_names), list(range(len(class_names)))
        numbers = dict(zip(ids, ids, strict=True))
    else:  # neither the .yaml nor the caller names the classes: take the numbers that occur in the labels
        ids = sorted({line[0] for items in labels.values() for *_, lines in items for line in lines} - {-1})
        names = tuple(f"class {number}" for number in ids)
        numbers = {category: number for number, category in enumerate(ids)}
    annotations = Annotations({}, names, tuple(ids), "cxcywh", problems)
    for split, items in labels.items():
        for path, file, lines in items:
            for number, *_ in lines:
                if number not in numbers:
                    problems.append(Problem("unknown class", file.name, f"number {number}"))
            entry = Entry(
                path if path.is_file() else None,
                file.name,
                sum(map(len, annotations.splits.values())) + 1,
                None,
                to_rows([box for _, box in lines]),
                np.array([numbers.get(number, -1) for number, _ in lines], np.int64),
                np.zeros(len(lines), bool),
                np.full(len(lines), np.nan),
                relative=True,
            )
            annotations.splits.setdefault(split, []).append(entry)
    used = {file for items in labels.values() for _, file, _ in items}
    there = {file for folder in {file.parent for file in used} for file in files_ending(folder, ".txt")}
    there |= {file for file in (home / "labels").rglob("*") if file.suffix.lower() == ".txt"}
    stray = there - used - {_label_file(path) for path in pictures_in(home / "images")}
    stray = {file for file in stray if file.name not in ("classes.txt", "labels.txt") and file.name[0] != "."}
    problems += [Problem("missing image", file.name, "its image is missing") for file in sorted(stray)]
    return annotations


def _yolo_names(root: Path, names: object) -> dict[int, str]:
    """Convert `names` of a .yaml file, which is a list or a dict, to a dict from number to name."""
    if names is None:
        return {}
    by_key = dict(enumerate(names)) if isinstance(names, list) else names
    if isinstance(by_key, dict) and all(to_whole(number) is not None for number in by_key):
        return {int(number): str(name) for number, name in by_key.items()}
    raise DataError(f"{root}: names must be a list of names or map numbers to names, not {names!r}")


def _yolo_images(home: Path, content: Mapping[str, Any], images: Path | None) -> dict[str, list[Path]]:
    base = home / str(content.get("path", "")) if (home / str(content.get("path", ""))).is_dir() else home
    if images:
        return {"": pictures_in(images)}
    by_split: dict[str, list[Path]] = {}
    for name, split in SPLITS.items():
        for item in _listed(content.get(name)):
            # for a folder next to the .yaml, some exporters write ../train/images instead of train/images
            places = [base / item, base / str(item).removeprefix("../")]
            by_split.setdefault(split, []).extend(next((pictures_in(place) for place in places if place.exists()), []))
    folders = split_folders(base / "images")
    folders += [(split, folder / "images") for split, folder in split_folders(base)]
    for split, folder in folders:
        if not by_split.get(split):  # the .yaml does not name the split
            by_split[split] = pictures_in(folder)
    return by_split if any(by_split.values()) else {"": pictures_in(base / "images")}


def _label_file(image: Path) -> Path:
    """Return the label file of …/images/…/x.jpg: …/labels/…/x.txt if it exists, else x.txt next to the image."""
    places = [image]
    for place in range(len(image.parts) - 2, -1, -1):
        if image.parts[place] == "images":
            places.insert(0, Path(*image.parts[:place], "labels", *image.parts[place + 1 :]))
            break
    files = [place.with_suffix(suffix) for place in places for suffix in (".txt", ".TXT")]
    return next((file for file in files if file.is_file()), files[0])  # if none exists, the preferred path


def _yolo_lines(file: Path, problems: list[Problem]) -> list[tuple[int, list[float]]]:
    """Read (class, [centre x, centre y, width, height]) of each line; an invalid class becomes −1."""
    if not file.is_file():
        return []
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        values = [to_number(part) for part in line.split()]
        if not values:
            continue
        if len(values) > 6 and len(values) % 2:  # a polygon, which is replaced by its bounding box
            x, y = np.array(values[1::2]), np.array(values[2::2])
            values = [values[0], *((edge.max() + edge.min()) / 2 for edge in (x, y)), np.ptp(x), np.ptp(y)]
        if len(values) != 5 or not math.isfinite(values[0]):
            problems.append(Problem("unreadable annotation", file.name, f"line {number}: {line.strip()[:60]!r}"))
            continue
        lines.append((int(values[0]) if values[0].is_integer() and values[0] >= 0 else -1, values[1:]))
    return lines


def _listed(value: Any) -> list[Any]:  # value: an entry of a user's .yaml
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []
