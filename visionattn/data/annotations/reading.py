"""Annotations of boxes, whichever of the three layouts a folder has: COCO, Pascal VOC or YOLO; no torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from visionattn.data.annotations.boxes import Annotations, BoxFormat
from visionattn.data.annotations.coco import coco_files, read_coco
from visionattn.data.annotations.parsing import SPLITS, resplit
from visionattn.data.annotations.voc import read_voc, xml_folders
from visionattn.data.annotations.yolo import read_yolo, yaml_of
from visionattn.errors import DataError, UsageError, nearest

Layout = Literal["coco", "voc", "yolo"]


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
    readers = {"coco": read_coco, "voc": read_voc, "yolo": read_yolo}
    found = readers[layout_of(root)](root, Path(images) if images else None, class_names)
    found.box_format = box_format or found.box_format
    return resplit(found, {SPLITS[name]: Path(file) for name, file in splits.items()}) if splits else found


def layout_of(root: Path) -> Layout:
    """Tell which layout a folder has."""
    if root.is_file():
        return "coco" if root.suffix.lower() == ".json" else "yolo"
    others: list[Layout] = ["voc"] if xml_folders(root) else []
    if yaml_of(root) or any(path.is_dir() for path in (root / "labels", root / "train" / "labels")):
        others.append("yolo")
    # beside another layout a .json may be anything
    if any(not others or b'"annotations"' in file.read_bytes() for file in coco_files(root)):
        return "coco"
    if others:
        return others[0]
    raise DataError(
        f"{root} holds no annotations: neither COCO's .json, nor Pascal VOC's Annotations/*.xml, nor YOLO's labels/"
    )
