"""COCO's json, Pascal VOC's xml and YOLO's txt, read into one form; no torch."""

import json
import math
import os
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml

from visionattn.data.boxes import Annotations, BoxFormat, Entry, Problem
from visionattn.data.decode import SUFFIXES
from visionattn.errors import DataError, nearest

SPLITS = ("train", "val", "test")
Layout = Literal["coco", "voc", "yolo"]
_ALIASES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
_IMAGE_FOLDERS = ("images", "JPEGImages", "Images", "imgs", "")


def read_annotations(
    root: str | os.PathLike[str],
    *,
    images: str | None = None,
    class_names: Sequence[str] | None = None,
    splits: Mapping[str, str] | None = None,
    box_format: BoxFormat | None = None,
) -> Annotations:
    """Read the annotations of a folder; which of the three layouts it has is told from what lies there.

    - COCO: .json files in the folder or in its annotations/, a split each where their names say so, or one in each of
      train/, val/ (or valid/) and test/.
    - Pascal VOC: .xml files in Annotations/ (or beside the images), images in JPEGImages/ or images/, splits in
      ImageSets/Main/train.txt, val.txt, test.txt. Coordinates are taken as they are written; the original VOC counts
      pixels from 1, most tools that write the format do not, which is a pixel at most.
    - YOLO: data.yaml (or another .yaml with `names`), or images/ and labels/, in sub-folders for the splits. A line of
      more than five numbers is a polygon, whose hull is taken.

    Args:
        root: the folder, or one .json or .yaml file.
        images: folder of the images, where it is none of the usual.
        class_names: what the classes shall be, in this order; those in the files by default.
        splits: split files, `{train: train.txt, …}`: an image a line, with or without folder and suffix. They
            replace the splits that the layout has.
        box_format: of the numbers in the files, where it is not the layout's own (COCO xywh, VOC xyxy, YOLO cxcywh).

    Raises:
        DataError: there is no such folder, it holds no annotations, or a split file is missing.
    """
    root = Path(root)
    if not root.exists():
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(f"there is no folder {root}.{nearest(root.name, siblings)}")
    readers = {"coco": _read_coco, "voc": _read_voc, "yolo": _read_yolo}
    found = readers[layout_of(root)](root, Path(images) if images else None, class_names)
    found.box_format = box_format or found.box_format
    return _resplit(found, {name: Path(file) for name, file in splits.items()}) if splits else found


def layout_of(root: Path) -> Layout:
    """Tell which layout a folder has."""
    if root.is_file():
        return "coco" if root.suffix == ".json" else "yolo"
    if _coco_files(root):
        return "coco"
    if _xml_folders(root):
        return "voc"
    if _yaml_of(root) or any(path.is_dir() for path in (root / "labels", root / "train" / "labels")):
        return "yolo"
    raise DataError(
        f"{root} holds no annotations: neither COCO's .json, nor Pascal VOC's Annotations/*.xml, nor YOLO's labels/"
    )


# COCO -----------------------------------------------------------------------------------------------------------------


def _coco_files(root: Path) -> list[Path]:
    places = [root, root / "annotations", *(root / name for name in _ALIASES)]
    files = [file for place in places if place.is_dir() for file in sorted(place.glob("*.json"))]
    return [file for file in files if not file.name.startswith(("captions", "person_keypoints", "."))]


def _read_coco(root: Path, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    files = [root] if root.is_file() else _coco_files(root)
    contents = [(file, _load_json(file)) for file in files]
    contents = [(file, content) for file, content in contents if {"images", "annotations"} <= content.keys()]
    if not contents:
        raise DataError(f"{root}: no .json there is COCO's: an object with images, annotations and categories")
    categories: dict[int, str] = {}
    for _, content in contents:
        categories |= {int(category["id"]): str(category["name"]) for category in content.get("categories", ())}
    ids = sorted(categories)
    if class_names:
        by_name = {name: number for number, name in categories.items()}
        absent = [name for name in class_names if name not in by_name]
        if absent:
            raise DataError(f"{root} has no class {absent[0]!r}.{nearest(absent[0], by_name)}")
        ids = [by_name[name] for name in class_names]
    numbers = {category: number for number, category in enumerate(ids)}
    found = Annotations({}, tuple(categories[number] for number in ids), tuple(ids), "xywh")
    for file, content in contents:
        split = _split_of(file.stem) or _split_of(file.parent.name) or ""
        found.splits.setdefault(split, []).extend(_coco_entries(file, content, images, split, numbers, found.problems))
    return found


def _coco_entries(
    file: Path,
    content: Mapping[str, Any],
    images: Path | None,
    split: str,
    numbers: Mapping[int, int],
    problems: list[Problem],
) -> list[Entry]:
    home = file.parent.parent if file.parent.name == "annotations" else file.parent
    token = file.stem.rpartition("_")[2]  # instances_train2017 → train2017
    folders = [images] if images else []
    folders += [home / part / name for part in (token, split, "") for name in _IMAGE_FOLDERS]
    folders += [home / name / part for part in (token, split) if part for name in _IMAGE_FOLDERS]
    boxes: dict[Any, list[Mapping[str, Any]]] = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        where = f"{file.name}, annotation {annotation.get('id', '?')}"
        if annotation.get("image_id") not in boxes:
            problems.append(Problem("unknown image", where, f"image_id {annotation.get('image_id')} is not listed"))
            continue
        if annotation.get("category_id") not in numbers:
            problems.append(Problem("unknown class", where, f"category_id {annotation.get('category_id')}"))
        boxes[annotation["image_id"]].append(annotation)
    entries = []
    for image in content["images"]:
        some, name = boxes[image["id"]], str(image.get("file_name", ""))
        path = next((folder / name for folder in folders if name and (folder / name).is_file()), None)
        entry = Entry(
            path,
            f"{file.name}, {name or image['id']}",
            int(image["id"]),
            (int(image["height"]), int(image["width"])) if {"height", "width"} <= image.keys() else None,
            _rows([annotation.get("bbox") for annotation in some]),
            np.array([numbers.get(annotation.get("category_id"), -1) for annotation in some], np.int64),  # type: ignore[arg-type]
            np.array([bool(annotation.get("iscrowd")) for annotation in some], bool),
            np.array([_number(annotation.get("area")) for annotation in some], float),
        )
        entries.append(entry)
    return entries


def _load_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is no json: {error}") from error
    return content if isinstance(content, dict) else {}


# Pascal VOC -----------------------------------------------------------------------------------------------------------


def _xml_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, folder of .xml files); the split is "" where the folder is for all."""
    places = [("", root / "Annotations"), ("", root / "annotations"), ("", root)]
    places += [(split, root / name) for name, split in _ALIASES.items()]
    places += [(split, root / name / "Annotations") for name, split in _ALIASES.items()]
    return [(split, place) for split, place in places if place.is_dir() and next(place.glob("*.xml"), None)]


def _read_voc(root: Path, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    problems: list[Problem] = []
    parsed = []
    for split, folder in _xml_folders(root):
        base = folder.parent if folder.name.lower() == "annotations" else folder
        pictures = _by_stem([images] if images else [base / name for name in _IMAGE_FOLDERS])
        for file in sorted(folder.glob("*.xml")):
            try:
                tree = ET.parse(file).getroot()
            except ET.ParseError as error:
                problems.append(Problem("unreadable annotation", file.name, str(error)))
                continue
            path = pictures.get(file.stem) or pictures.get(Path(tree.findtext("filename") or "").stem)
            parsed.append((split, file, tree, path))
    names = class_names or sorted({_text(item, "name") for _, _, tree, _ in parsed for item in tree.iter("object")})
    numbers = {name: number for number, name in enumerate(names)}
    found = Annotations({}, tuple(names), tuple(range(1, len(names) + 1)), "xyxy", problems)
    for number, (split, file, tree, path) in enumerate(parsed, start=1):
        items = list(tree.iter("object"))
        for item in items:
            if _text(item, "name") not in numbers:
                problems.append(Problem("unknown class", file.name, repr(_text(item, "name"))))
        size = [_number(tree.findtext(f"size/{side}")) for side in ("height", "width")]
        corners = [[item.findtext(f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")] for item in items]
        entry = Entry(
            path,
            file.name,
            number,
            None if np.isnan(size).any() else (int(size[0]), int(size[1])),
            _rows(corners),
            np.array([numbers.get(_text(item, "name"), -1) for item in items], np.int64),
            np.array([_text(item, "difficult") == "1" for item in items], bool),
            np.full(len(items), np.nan),
        )
        found.splits.setdefault(split, []).append(entry)
    lists = root / "ImageSets" / "Main"
    files = {split: lists / f"{split}.txt" for split in SPLITS if (lists / f"{split}.txt").is_file()}
    return _resplit(found, files) if files else found


def _text(item: ET.Element, name: str) -> str:
    return (item.findtext(name) or "").strip()


# YOLO -----------------------------------------------------------------------------------------------------------------


def _yaml_of(root: Path) -> dict[str, Any] | None:
    for file in [root] if root.is_file() else sorted([*root.glob("*.yaml"), *root.glob("*.yml")]):
        try:
            content = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError):
            continue
        if isinstance(content, dict) and "names" in content:
            return content
    return None


def _read_yolo(root: Path, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    content = _yaml_of(root)
    if content is None and root.is_file():
        raise DataError(f"{root} is no data set of YOLO's: a .yaml file with names")
    home = root.parent if root.is_file() else root
    names = content["names"] if content else ()
    ids = sorted(int(number) for number in names) if isinstance(names, dict) else list(range(len(names)))
    known = tuple(str(names[number]) for number in ids)
    folders = {split: paths for split, paths in _yolo_images(home, content or {}, images).items() if paths}
    if not folders:
        raise DataError(f"{root} has labels and no images; give their folder: images: PATH")
    problems: list[Problem] = []
    labels: dict[str, list[tuple[Path, Path, list[list[float]]]]] = {}
    for split, paths in folders.items():
        for path in paths:
            file = _label_file(path)
            labels.setdefault(split, []).append((path, file, _yolo_lines(file, problems)))
    if not known:  # nobody names the classes: as many as there are numbers
        highest = max((int(line[0]) for some in labels.values() for *_, lines in some for line in lines), default=0)
        ids = list(range(highest + 1))
        known = tuple(class_names or (f"class {number}" for number in ids))[: len(ids)]
    numbers = {category: number for number, category in enumerate(ids[: len(known)])}
    found = Annotations({}, known, tuple(ids[: len(known)]), "cxcywh", problems)
    used = set()
    for split, some in labels.items():
        for path, file, lines in some:
            used.add(file)
            for line in lines:
                if line[0] not in numbers:
                    problems.append(Problem("unknown class", file.name, f"number {line[0]:g}"))
            entry = Entry(
                path,
                file.name,
                sum(map(len, found.splits.values())) + 1,
                None,
                _rows([line[1:5] for line in lines]),
                np.array(
                    [numbers.get(int(line[0]) if line[0] == int(line[0]) else -1, -1) for line in lines], np.int64
                ),
                np.zeros(len(lines), bool),
                np.full(len(lines), np.nan),
                relative=True,
            )
            found.splits.setdefault(split, []).append(entry)
    stray = {file for folder in {file.parent for file in used} for file in folder.glob("*.txt")} - used
    stray = {file for file in stray if file.name not in ("classes.txt", "labels.txt")}
    problems += [Problem("missing image", file.name, "its image is not there") for file in sorted(stray)]
    return found


def _yolo_images(home: Path, content: Mapping[str, Any], images: Path | None) -> dict[str, list[Path]]:
    base = home / str(content.get("path", "")) if (home / str(content.get("path", ""))).is_dir() else home
    if images:
        return {"": _pictures(images)}
    found: dict[str, list[Path]] = {}
    for name, split in _ALIASES.items():
        for item in _listed(content.get(name)):
            # exporters write ../train/images for what lies beside the file
            places = [base / item, base / str(item).removeprefix("../")]
            found.setdefault(split, []).extend(next((_pictures(place) for place in places if place.exists()), []))
        if not content.get(name):
            places = [base / "images" / name, base / name / "images"]
            found.setdefault(split, []).extend(next((_pictures(place) for place in places if place.is_dir()), []))
    return found if any(found.values()) else {"": _pictures(base / "images")}


def _label_file(image: Path) -> Path:
    """…/images/…/x.jpg → …/labels/…/x.txt; beside the image where there is no images/."""
    parts = list(image.parts)
    for place in range(len(parts) - 2, -1, -1):
        if parts[place] == "images":
            return Path(*parts[:place], "labels", *parts[place + 1 :]).with_suffix(".txt")
    return image.with_suffix(".txt")


def _yolo_lines(file: Path, problems: list[Problem]) -> list[list[float]]:
    """[class, centre x, centre y, width, height] of each line; of a polygon, those of its hull."""
    if not file.is_file():
        return []
    lines = []
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        values = [_number(part) for part in line.split()]
        if not values:
            continue
        if len(values) > 6 and len(values) % 2:
            x, y = np.array(values[1::2]), np.array(values[2::2])
            values = [values[0], *((edge.max() + edge.min()) / 2 for edge in (x, y)), np.ptp(x), np.ptp(y)]
        if len(values) != 5 or math.isnan(values[0]):
            problems.append(Problem("unreadable annotation", file.name, f"line {number}: {line.strip()[:60]!r}"))
            continue
        lines.append(values)
    return lines


# what they share ------------------------------------------------------------------------------------------------------


def _resplit(found: Annotations, files: Mapping[str, Path]) -> Annotations:
    """Divide the entries as split files say."""
    by_name: dict[str, Entry] = {}
    for entry in (entry for entries in found.splits.values() for entry in entries):
        for name in (Path(entry.where.rpartition(", ")[2]).name, entry.path.name if entry.path else ""):
            by_name |= {name: entry, Path(name).stem: entry} if name else {}
    splits: dict[str, list[Entry]] = {}
    for split, file in files.items():
        if not file.is_file():
            raise DataError(f"there is no split file {file}")
        splits[split] = []
        for line in file.read_text(encoding="utf-8").splitlines():
            name = Path(line.split()[0]).name if line.strip() else ""
            known = by_name.get(name) or by_name.get(Path(name).stem if Path(name).suffix.lower() in SUFFIXES else "")
            if known:
                splits[split].append(known)
            elif name:
                found.problems.append(Problem("not annotated", file.name, name))
    return Annotations(splits, found.class_names, found.category_ids, found.box_format, found.problems)


def _split_of(name: str) -> str | None:
    for part in name.lower().replace("-", "_").split("_"):
        for alias, split in _ALIASES.items():
            if part.rstrip("0123456789") == alias:
                return split
    return None


def _by_stem(folders: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for path in _pictures(folder, deep=False):
            found.setdefault(path.stem, path)
    return found


def _pictures(place: Path, *, deep: bool = True) -> list[Path]:
    """The images of a folder, or those that a text file lists."""
    if place.is_file():
        lines = place.read_text(encoding="utf-8").splitlines()
        return [place.parent / line.strip() for line in lines if line.strip()]
    if not place.is_dir():
        return []
    files = sorted(place.rglob("*") if deep else place.iterdir())
    return [file for file in files if file.suffix.lower() in SUFFIXES and not file.name.startswith(".")]


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, (list, tuple)) else [value] if value else []


def _rows(values: Sequence[Any]) -> "np.ndarray[Any, np.dtype[np.float64]]":
    """(N, 4); NaN for what is no number or missing."""
    rows = [
        [_number(value) for value in row] if isinstance(row, (list, tuple)) and len(row) == 4 else [math.nan] * 4
        for row in values
    ]
    return np.array(rows, np.float64).reshape(-1, 4)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan
