"""Read Pascal VOC's .xml annotation files. This file does not import torch."""

import xml.etree.ElementTree as ET
from collections.abc import Iterable, Sequence
from pathlib import Path, PureWindowsPath

import numpy as np

from visionattn.data.annotations.boxes import Annotations, Entry, Problem
from visionattn.data.annotations.parsing import (
    IMAGE_FOLDERS,
    files_ending,
    pictures_in,
    resplit,
    split_folders,
    stated_size,
    to_rows,
)
from visionattn.data.decode import SUFFIXES


def xml_folders(root: Path) -> list[tuple[str, Path]]:
    """Return (split, folder) of each folder with .xml files; the split is "" if the folder is for all splits."""
    places = [("", root / "Annotations"), ("", root / "annotations"), ("", root)]
    places += split_folders(root)
    places += [(split, folder / "Annotations") for split, folder in split_folders(root)]
    folders: list[tuple[str, Path]] = []
    for split, place in places:
        # on a file system that ignores case, Annotations and annotations are the same folder
        if files_ending(place, ".xml") and not any(place.samefile(other) for _, other in folders):
            folders.append((split, place))
    return folders


def read_voc(root: Path, images: Path | None, class_names: Sequence[str] | None) -> Annotations:
    """Read a folder in Pascal VOC's layout; see `read_annotations`.

    Raises:
        DataError: a line of a split file matches two images.
    """
    problems: list[Problem] = []
    parsed = []
    for split, folder in xml_folders(root):
        base = folder.parent if folder.name.lower() == "annotations" else folder
        pictures = _by_stem([images] if images else [base / name for name in IMAGE_FOLDERS])
        for file in files_ending(folder, ".xml"):
            try:
                tree = ET.parse(file).getroot()
            except (ET.ParseError, LookupError, ValueError) as error:  # not well-formed, or in an unknown encoding
                problems.append(Problem("unreadable annotation", file.name, str(error)))
                continue
            path = pictures.get(file.stem) or pictures.get(Path(_text(tree, "filename")).stem)
            parsed.append((split, file, tree, path if path or images else _named_image(tree, file, base)))
    names = class_names or sorted(
        {_text(item, "name") for _, _, tree, _ in parsed for item in tree.iter("object")} - {""}
    )
    numbers = {name: number for number, name in enumerate(names)}
    annotations = Annotations({}, tuple(names), tuple(range(1, len(names) + 1)), "xyxy", problems)
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
        annotations.splits.setdefault(split, []).append(entry)
    lists = root / "ImageSets" / "Main"
    files = {split: lists / f"{split}.txt" for split in ("train", "val", "test")}
    files = {split: file for split, file in files.items() if file.is_file()}
    if not files.keys() & {"train", "val"} and (lists / "trainval.txt").is_file():
        files["train"] = lists / "trainval.txt"
    return resplit(annotations, files) if files else annotations


def _text(item: ET.Element, name: str) -> str:
    return (item.findtext(name) or "").strip()


def _by_stem(folders: Iterable[Path]) -> dict[str, Path]:
    by_stem: dict[str, Path] = {}
    for folder in folders:
        for path in pictures_in(folder, deep=False):
            by_stem.setdefault(path.stem, path)
    return by_stem


def _named_image(tree: ET.Element, file: Path, base: Path) -> Path | None:
    """Return the image that <folder> and <path> name, relative to the data set or absolute, if it exists."""
    named = PureWindowsPath(_text(tree, "path"))  # of either system: it takes / and \\ alike
    name = _text(tree, "filename") or named.name
    folder = _text(tree, "folder").replace("\\", "/")
    places = [base / folder / name, base.parent / folder / name, file.parent / folder / name]
    places += [Path(_text(tree, "path")), base / named.parent.name / named.name, base / named.name]
    return next((place for place in places if place.suffix.lower() in SUFFIXES and place.is_file()), None)
