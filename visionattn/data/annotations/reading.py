"""Read box annotations in one of three layouts: COCO, Pascal VOC or YOLO. This file does not import torch."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from visionattn.data.annotations.boxes import Annotations, BoxFormat
from visionattn.data.annotations.coco import coco_files, read_coco
from visionattn.data.annotations.parsing import SPLITS, resplit, split_folders
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
    """Read the annotations of a folder. The files in the folder determine the layout.

    - COCO: .json files in the folder or in its sub-folder annotations/, each with its split in the file name; or one
      .json file in each of train/, val/ (or valid/) and test/. Without such names there is a single unnamed split.
    - Pascal VOC: .xml files in Annotations/ (or next to the images), images in JPEGImages/ or images/, or else where
      <folder> or <path> in the .xml says, splits in ImageSets/Main/train.txt, val.txt, test.txt. Coordinates are used
      as written. The original VOC counts pixels from 1, but most tools that write the format count from 0; the
      difference is at most one pixel.
    - YOLO: data.yaml (or another .yaml with `names`), or images/ and labels/, with sub-folders for the splits. A line
      with more than six numbers is a polygon, which is replaced by its bounding box.

    Args:
        root: the folder, or one .json or .yaml file.
        images: folder of the images (default: the layout's usual folders).
        class_names: the classes to read, in the order of their labels (default: those in the files).
        splits: split files, `{train: train.txt, …}`, which replace the splits of the layout. Each line names an image.
            The suffix may be left out, and so may the folder, unless images in two folders have the same name.
        box_format: format of the boxes in the files (default: COCO xywh, VOC xyxy, YOLO cxcywh).

    Raises:
        UsageError: a key of `splits` is not train, val or test.
        DataError: the folder does not exist or holds no annotations, its files contradict each other, or a split file
            is missing.
    """
    root = Path(root)
    if unknown := [name for name in splits or () if name not in SPLITS]:
        raise UsageError(
            f"splits are train, val and test, not {unknown[0]!r}.{nearest(unknown[0], dict.fromkeys(SPLITS.values()))}"
        )
    if not root.exists():
        siblings = [entry.name for entry in root.parent.iterdir()] if root.parent.is_dir() else []
        raise DataError(f"there is no folder {root}.{nearest(root.name, siblings)}")
    if images and not Path(images).exists():
        raise DataError(f"there is no folder of images {images}")
    readers = {"coco": read_coco, "voc": read_voc, "yolo": read_yolo}
    annotations = readers[layout_of(root)](root, Path(images) if images else None, class_names)
    annotations.box_format = box_format or annotations.box_format
    return resplit(annotations, {SPLITS[name]: Path(file) for name, file in splits.items()}) if splits else annotations


def layout_of(root: Path) -> Layout:
    """Recognise the layout of a folder or file.

    Raises:
        DataError: the folder holds no annotations.
    """
    if root.is_file():
        return "coco" if root.suffix.lower() == ".json" else "yolo"
    others: list[Layout] = ["voc"] if xml_folders(root) else []
    if yaml_of(root) or any(
        path.is_dir() for path in (root / "labels", *(folder / "labels" for _, folder in split_folders(root)))
    ):
        others.append("yolo")
    # if the folder also fits another layout, only a .json file with "annotations" makes it a COCO folder
    if any(not others or b'"annotations"' in file.read_bytes() for file in coco_files(root)):
        return "coco"
    if others:
        return others[0]
    raise DataError(
        f"{root} holds no annotations: neither COCO's .json, nor Pascal VOC's Annotations/*.xml, nor YOLO's labels/"
    )
