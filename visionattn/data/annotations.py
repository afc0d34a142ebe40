"""COCO's json and Pascal VOC's xml, and YOLO's txt (`yolo`), read into one form; no torch."""

import json
import os
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from visionattn.data.boxes import Annotations, BoxFormat, Entry, Problem
from visionattn.data.decode import SUFFIXES
from visionattn.data.reading import (
    SPLITS,
    chosen_names,
    files_ending,
    pictures_in,
    split_of,
    stated_size,
    to_number,
    to_rows,
    to_whole,
)
from visionattn.data.yolo import read_yolo, yaml_of
from visionattn.errors import DataError, UsageError, nearest

Layout = Literal["coco", "voc", "yolo"]
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
            replace the splits that the layout has. Folders tell apart images of the same name.
        box_format: of the numbers in the files, where it is not the layout's own (COCO xywh, VOC xyxy, YOLO cxcywh).

    Raises:
        UsageError: `splits` has another than train, val and test.
        DataError: there is no such folder, it holds no annotations, files of it contradict each other, or a split file
            is missing.
    """
    root = Path(root)
    if unknown := [name for name in splits or () if name not in SPLITS]:
        raise UsageError(f"splits are train, val and test, not {unknown[0]!r}.{nearest(unknown[0], SPLITS)}")
    if not root.exists():
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(f"there is no folder {root}.{nearest(root.name, siblings)}")
    if images and not Path(images).exists():
        raise DataError(f"there is no folder of images {images}")
    readers = {"coco": _read_coco, "voc": _read_voc, "yolo": read_yolo}
    found = readers[layout_of(root)](root, Path(images) if images else None, class_names)
    found.box_format = box_format or found.box_format
    return _resplit(found, {SPLITS[name]: Path(file) for name, file in splits.items()}) if splits else found


def layout_of(root: Path) -> Layout:
    """Tell which layout a folder has."""
    if root.is_file():
        return "coco" if root.suffix.lower() == ".json" else "yolo"
    others: list[Layout] = ["voc"] if _xml_folders(root) else []
    if yaml_of(root) or any(path.is_dir() for path in (root / "labels", root / "train" / "labels")):
        others.append("yolo")
    # beside another layout a .json may be anything
    if any(not others or b'"annotations"' in file.read_bytes() for file in _coco_files(root)):
        return "coco"
    if others:
        return others[0]
    raise DataError(
        f"{root} holds no annotations: neither COCO's .json, nor Pascal VOC's Annotations/*.xml, nor YOLO's labels/"
    )


# COCO -----------------------------------------------------------------------------------------------------------------


def _coco_files(root: Path) -> list[Path]:
    places = [root, root / "annotations", *(root / name for name in SPLITS)]
    files = [file for place in places for file in files_ending(place, ".json")]
    return [file for file in files if not file.name.startswith(("captions", "person_keypoints"))]


def _read_coco(root: Path, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    files = [root] if root.is_file() else _coco_files(root)
    contents = [(file, _load_json(file)) for file in files]
    contents = [(file, content) for file, content in contents if {"images", "annotations"} <= content.keys()]
    if not contents:
        raise DataError(f"{root}: no .json there is COCO's: an object with images, annotations and categories")
    categories: dict[int, str] = {}
    for file, content in contents:
        for number, name in _categories(file, content):
            if categories.setdefault(number, name) != name:
                raise DataError(f"{file} calls class {number} {name!r}, and another .json there {categories[number]!r}")
    # of two numbers with one name, as some exporters write them, the later is the class's own, and both mean it
    by_name = {categories[number]: number for number in sorted(categories)}
    names = chosen_names(class_names, by_name, root)
    numbers = {number: names.index(name) for number, name in categories.items() if name in names}
    found = Annotations({}, names, tuple(by_name[name] for name in names), "xywh")
    for file, content in contents:
        split = split_of(file.stem) or split_of(file.parent.name) or ""
        found.splits.setdefault(split, []).extend(_coco_entries(file, content, images, split, numbers, found.problems))
    return found


def _categories(file: Path, content: Mapping[str, Any]) -> Iterable[tuple[int, str]]:
    for category in _objects(file, content, "categories"):
        number = to_whole(category.get("id"))
        if number is None or "name" not in category:
            raise DataError(f"{file}: category {category} needs a whole number as id, and a name")
        yield number, str(category["name"])


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
    listed = _objects(file, content, "images")
    uses = Counter(to_whole(image.get("id")) for image in listed)
    if uses[None]:
        image = next(image for image in listed if to_whole(image.get("id")) is None)
        raise DataError(f"{file}: image {image.get('file_name')!r} needs a whole number as id, not {image.get('id')!r}")
    boxes: dict[int | None, list[Mapping[str, Any]]] = {number: [] for number in uses}
    for annotation in _objects(file, content, "annotations"):
        where = f"{file.name}, annotation {annotation.get('id', '?')}"
        number = to_whole(annotation.get("image_id"))
        if number not in boxes:
            problems.append(Problem("unknown image", where, f"image_id {annotation.get('image_id')} is not listed"))
            continue
        if to_whole(annotation.get("category_id")) not in numbers:
            problems.append(Problem("unknown class", where, f"category_id {annotation.get('category_id')}"))
        boxes[number].append(annotation)
    entries = []
    for image in listed:
        number, name = to_whole(image["id"]), str(image.get("file_name", ""))
        where = f"{file.name}, {name or number}"
        if uses[number] > 1:
            problems.append(Problem("shared id", where, f"id {number} is also another image's"))
        if number is None or uses[number] > 1:
            continue
        some = boxes[number]
        entry = Entry(
            next((folder / name for folder in folders if name and (folder / name).is_file()), None),
            where,
            number,
            stated_size(image.get("height"), image.get("width")),
            to_rows([annotation.get("bbox") for annotation in some]),
            np.array([numbers.get(to_whole(annotation.get("category_id")), -1) for annotation in some], np.int64),  # type: ignore[arg-type]
            np.array([bool(annotation.get("iscrowd")) for annotation in some], bool),
            np.array([to_number(annotation.get("area")) for annotation in some], float),
        )
        entries.append(entry)
    return entries


def _load_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is no json: {error}") from error
    return content if isinstance(content, dict) else {}


def _objects(file: Path, content: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    some = content.get(name, [])
    if not isinstance(some, list) or not all(isinstance(one, dict) for one in some):
        raise DataError(f"{file} is not COCO's: {name} must be a list of objects")
    return some


# Pascal VOC -----------------------------------------------------------------------------------------------------------


def _xml_folders(root: Path) -> list[tuple[str, Path]]:
    """(split, folder of .xml files); the split is "" where the folder is for all."""
    places = [("", root / "Annotations"), ("", root / "annotations"), ("", root)]
    places += [(split, root / name) for name, split in SPLITS.items()]
    places += [(split, root / name / "Annotations") for name, split in SPLITS.items()]
    found: list[tuple[str, Path]] = []
    for split, place in places:
        # Annotations and annotations are one where case is ignored
        if files_ending(place, ".xml") and not any(place.samefile(other) for _, other in found):
            found.append((split, place))
    return found


def _read_voc(root: Path, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    problems: list[Problem] = []
    parsed = []
    for split, folder in _xml_folders(root):
        base = folder.parent if folder.name.lower() == "annotations" else folder
        pictures = _by_stem([images] if images else [base / name for name in _IMAGE_FOLDERS])
        for file in files_ending(folder, ".xml"):
            try:
                tree = ET.parse(file).getroot()
            except (ET.ParseError, LookupError, ValueError) as error:  # not well-formed, or of an unknown encoding
                problems.append(Problem("unreadable annotation", file.name, str(error)))
                continue
            path = pictures.get(file.stem) or pictures.get(Path(tree.findtext("filename") or "").stem)
            parsed.append((split, file, tree, path))
    names = class_names or sorted(
        {_text(item, "name") for _, _, tree, _ in parsed for item in tree.iter("object")} - {""}
    )
    numbers = {name: number for number, name in enumerate(names)}
    found = Annotations({}, tuple(names), tuple(range(1, len(names) + 1)), "xyxy", problems)
    for number, (split, file, tree, path) in enumerate(parsed, start=1):
        items = list(tree.iter("object"))
        for item in items:
            if _text(item, "name") not in numbers:
                problems.append(Problem("unknown class", file.name, repr(_text(item, "name"))))
        corners = [[item.findtext(f"bndbox/{edge}") for edge in ("xmin", "ymin", "xmax", "ymax")] for item in items]
        entry = Entry(
            path,
            file.name,
            number,
            stated_size(tree.findtext("size/height"), tree.findtext("size/width")),
            to_rows(corners),
            np.array([numbers.get(_text(item, "name"), -1) for item in items], np.int64),
            np.array([_text(item, "difficult") == "1" for item in items], bool),
            np.full(len(items), np.nan),
        )
        found.splits.setdefault(split, []).append(entry)
    lists = root / "ImageSets" / "Main"
    files = {split: lists / f"{split}.txt" for split in ("train", "val", "test")}
    files = {split: file for split, file in files.items() if file.is_file()}
    if not files.keys() & {"train", "val"} and (lists / "trainval.txt").is_file():
        files["train"] = lists / "trainval.txt"
    return _resplit(found, files) if files else found


def _text(item: ET.Element, name: str) -> str:
    return (item.findtext(name) or "").strip()


# what they share ------------------------------------------------------------------------------------------------------


def _resplit(found: Annotations, files: Mapping[str, Path]) -> Annotations:
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


def _by_stem(folders: Iterable[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in folders:
        for path in pictures_in(folder, deep=False):
            found.setdefault(path.stem, path)
    return found
