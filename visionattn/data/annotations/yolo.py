"""YOLO's txt files as annotations; no torch."""

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
    to_number,
    to_rows,
    to_whole,
)
from visionattn.errors import DataError


def yaml_of(root: Path) -> dict[str, Any] | None:
    """The content of a data.yaml, or of the first .yaml of a folder that has `names`."""
    for file in [root] if root.is_file() else [*files_ending(root, ".yaml"), *files_ending(root, ".yml")]:
        try:
            content = yaml.safe_load(file.read_bytes())
        except (yaml.YAMLError, UnicodeDecodeError, OSError):
            continue
        if isinstance(content, dict) and "names" in content:
            return content
    return None


def read_yolo(root: Path, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    """Read a folder or a .yaml file in YOLO's layout; see `annotations.read_annotations`.

    Raises:
        DataError: it is none, its names are no names, or there are no images.
    """
    content = yaml_of(root)
    if content is None and root.is_file():
        raise DataError(f"{root} is no data set of YOLO's: a .yaml file with names")
    home = root.parent if root.is_file() else root
    known = _yolo_names(root, content["names"] if content else None)
    folders = {split: paths for split, paths in _yolo_images(home, content or {}, images).items() if paths}
    if not folders:
        raise DataError(f"{root} has labels and no images; give their folder: images: PATH")
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
    else:  # nobody names the classes: the numbers that there are
        ids = sorted({line[0] for some in labels.values() for *_, lines in some for line in lines} - {-1})
        names = tuple(f"class {number}" for number in ids)
        numbers = {category: number for number, category in enumerate(ids)}
    found = Annotations({}, names, tuple(ids), "cxcywh", problems)
    for split, some in labels.items():
        for path, file, lines in some:
            for number, *_ in lines:
                if number not in numbers:
                    problems.append(Problem("unknown class", file.name, f"number {number}"))
            entry = Entry(
                path if path.is_file() else None,
                file.name,
                sum(map(len, found.splits.values())) + 1,
                None,
                to_rows([box for _, box in lines]),
                np.array([numbers.get(number, -1) for number, _ in lines], np.int64),
                np.zeros(len(lines), bool),
                np.full(len(lines), np.nan),
                relative=True,
            )
            found.splits.setdefault(split, []).append(entry)
    used = {file for some in labels.values() for _, file, _ in some}
    there = {file for folder in {file.parent for file in used} for file in files_ending(folder, ".txt")}
    there |= {file for file in (home / "labels").rglob("*") if file.suffix.lower() == ".txt"}
    stray = there - used - {_label_file(path) for path in pictures_in(home / "images")}
    stray = {file for file in stray if file.name not in ("classes.txt", "labels.txt") and file.name[0] != "."}
    problems += [Problem("missing image", file.name, "its image is not there") for file in sorted(stray)]
    return found


def _yolo_names(root: Path, names: Any) -> dict[int, str]:
    """Number → name, of `names` in a .yaml file: a list, or a dict."""
    if isinstance(names, list):
        names = dict(enumerate(names))
    if names is None or (isinstance(names, dict) and all(to_whole(number) is not None for number in names)):
        return {int(number): str(name) for number, name in (names or {}).items()}
    raise DataError(f"{root}: names must be a list, or numbers with a name each, not {names!r}")


def _yolo_images(home: Path, content: Mapping[str, Any], images: Path | None) -> dict[str, list[Path]]:
    base = home / str(content.get("path", "")) if (home / str(content.get("path", ""))).is_dir() else home
    if images:
        return {"": pictures_in(images)}
    found: dict[str, list[Path]] = {}
    for name, split in SPLITS.items():
        for item in _listed(content.get(name)):
            # exporters write ../train/images for what lies beside the file
            places = [base / item, base / str(item).removeprefix("../")]
            found.setdefault(split, []).extend(next((pictures_in(place) for place in places if place.exists()), []))
    for name, split in SPLITS.items():
        if not found.get(split):  # else the file has named it, perhaps a folder valid/ as val
            places = [base / "images" / name, base / name / "images"]
            found[split] = next((pictures_in(place) for place in places if place.is_dir()), [])
    return found if any(found.values()) else {"": pictures_in(base / "images")}


def _label_file(image: Path) -> Path:
    """…/images/…/x.jpg → …/labels/…/x.txt, or beside the image; where neither is there, the one that is missed."""
    places = [image]
    for place in range(len(image.parts) - 2, -1, -1):
        if image.parts[place] == "images":
            places.insert(0, Path(*image.parts[:place], "labels", *image.parts[place + 1 :]))
            break
    files = [place.with_suffix(suffix) for place in places for suffix in (".txt", ".TXT")]
    return next((file for file in files if file.is_file()), files[0])


def _yolo_lines(file: Path, problems: list[Problem]) -> list[tuple[int, list[float]]]:
    """The class, −1 for none, and centre x, centre y, width, height of each line; of a polygon, those of its hull."""
    if not file.is_file():
        return []
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig", errors="replace").splitlines(), start=1):
        values = [to_number(part) for part in line.split()]
        if not values:
            continue
        if len(values) > 6 and len(values) % 2:
            x, y = np.array(values[1::2]), np.array(values[2::2])
            values = [values[0], *((edge.max() + edge.min()) / 2 for edge in (x, y)), np.ptp(x), np.ptp(y)]
        if len(values) != 5 or not math.isfinite(values[0]):
            problems.append(Problem("unreadable annotation", file.name, f"line {number}: {line.strip()[:60]!r}"))
            continue
        lines.append((int(values[0]) if values[0].is_integer() and values[0] >= 0 else -1, values[1:]))
    return lines


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []
