"""Read COCO's .json annotation files. This file does not import torch."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from visionattn.data.annotations.boxes import Annotations, Entry, Problem
from visionattn.data.annotations.parsing import (
    IMAGE_FOLDERS,
    chosen_names,
    files_ending,
    split_folders,
    split_of,
    stated_size,
    to_number,
    to_rows,
    to_whole,
)
from visionattn.errors import DataError


def coco_files(root: Path) -> list[Path]:
    """Return the .json files of a folder that may hold boxes."""
    places = [root, root / "annotations", *(folder for _, folder in split_folders(root))]
    files = [file for place in places for file in files_ending(place, ".json")]
    return [file for file in files if not file.name.startswith(("captions", "person_keypoints"))]


def read_coco(root: Path, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    """Read a folder or a .json file in COCO's layout; see `read_annotations`.

    Raises:
        DataError: there is no COCO file, or the files contradict each other.
    """
    files = [root] if root.is_file() else coco_files(root)
    contents = [(file, _load_json(file)) for file in files]
    contents = [(file, content) for file, content in contents if {"images", "annotations"} <= content.keys()]
    panoptic = [file for file, content in contents if _is_panoptic(file, content)]
    contents = [(file, content) for file, content in contents if file not in panoptic]
    if panoptic and not contents:
        raise DataError(
            f"{panoptic[0]} holds COCO's panoptic segments (segments_info), not boxes; use a file of instances, e.g. "
            "instances_train2017.json"
        )
    if not contents:
        raise DataError(
            f"{root}: no .json is in COCO's layout, which is an object with images, annotations and categories"
        )
    categories: dict[int, str] = {}
    for file, content in contents:
        for number, name in _categories(file, content):
            if categories.setdefault(number, name) != name:
                raise DataError(f"{file} names class {number} {name!r}, but another .json has {categories[number]!r}")
    # some exporters give two category ids the same name; these become one class with the higher id
    by_name = {categories[number]: number for number in sorted(categories)}
    names = chosen_names(class_names, by_name, root)
    numbers = {number: names.index(name) for number, name in categories.items() if name in names}
    annotations = Annotations({}, names, tuple(by_name[name] for name in names), "xywh")
    for file, content in contents:
        split = split_of(file.stem) or split_of(file.parent.name) or ""
        entries = _coco_entries(file, content, images, split, numbers, annotations.problems)
        annotations.splits.setdefault(split, []).extend(entries)
    return annotations


def _categories(file: Path, content: Mapping[str, object]) -> Iterable[tuple[int, str]]:
    for category in _objects(file, content, "categories"):
        number = to_whole(category.get("id"))
        if number is None or "name" not in category:
            raise DataError(f"{file}: category {category} needs a whole number as id, and a name")
        yield number, str(category["name"])


def _coco_entries(
    file: Path,
    content: Mapping[str, object],
    images: Path | None,
    split: str,
    numbers: Mapping[int, int],
    problems: list[Problem],
) -> list[Entry]:
    home = file.parent.parent if file.parent.name == "annotations" else file.parent
    token = file.stem.rpartition("_")[2]  # instances_train2017 → train2017
    folders = [images] if images else []
    tops = [home / token, *(folder for name, folder in split_folders(home) if name == split), home]
    folders += [top / name for top in tops for name in IMAGE_FOLDERS]
    for images_folder in (home / name for name in IMAGE_FOLDERS):
        folders += [images_folder / token, *(place for name, place in split_folders(images_folder) if name == split)]
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
        if _class_of(annotation, numbers) < 0:
            problems.append(Problem("unknown class", where, f"category_id {annotation.get('category_id')}"))
        boxes[number].append(annotation)
    entries = []
    for image in listed:
        number, name = to_whole(image["id"]), str(image.get("file_name", ""))
        where = f"{file.name}, {name or number}"
        if uses[number] > 1:
            problems.append(Problem("shared id", where, f"another image also has the id {number}"))
        if number is None or uses[number] > 1:
            continue
        own = boxes[number]
        entry = Entry(
            next((folder / name for folder in folders if name and (folder / name).is_file()), None),
            where,
            number,
            stated_size(image.get("height"), image.get("width")),
            to_rows([annotation.get("bbox") for annotation in own]),
            np.array([_class_of(annotation, numbers) for annotation in own], np.int64),
            np.array([bool(annotation.get("iscrowd")) for annotation in own], bool),
            np.array([to_number(annotation.get("area")) for annotation in own], float),
        )
        entries.append(entry)
    return entries


def _class_of(annotation: Mapping[str, object], numbers: Mapping[int, int]) -> int:
    """Return the label of an annotation, or −1 if its category is unknown."""
    category = to_whole(annotation.get("category_id"))
    return -1 if category is None else numbers.get(category, -1)


def _is_panoptic(file: Path, content: Mapping[str, object]) -> bool:
    annotations = _objects(file, content, "annotations")
    return bool(annotations) and all("segments_info" in annotation for annotation in annotations)


def _load_json(file: Path) -> dict[str, object]:
    try:
        content = json.loads(file.read_bytes())
    except (ValueError, OSError) as error:
        raise DataError(f"{file} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _objects(file: Path, content: Mapping[str, object], name: str) -> list[Mapping[str, Any]]:
    objects = content.get(name, [])
    if not isinstance(objects, list) or not all(isinstance(item, dict) for item in objects):
        raise DataError(f"{file} is not in COCO's layout: {name} must be a list of objects")
    return objects
