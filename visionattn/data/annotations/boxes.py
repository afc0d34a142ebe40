"""Classes for images with boxes, and checks of the boxes in annotation files. This file does not import torch.

Boxes are xyxy in pixels of the source image: pixel i covers [i, i + 1).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from visionattn.data.placement import Size
from visionattn.errors import DataError

BoxFormat = Literal["xyxy", "xywh", "cxcywh"]
"""xyxy: two corners; xywh: the top-left corner and the size; cxcywh: the centre and the size."""

_ROUNDING = 0.5  # pixels; boxes that reach over the edge by at most this much are clipped without a report
_PLAUSIBLE = 0.98  # another format is suggested if at least this fraction of the boxes fits that format
_ENOUGH = 8  # with fewer boxes than this, the format is not checked


class Problem(NamedTuple):
    """A problem with an annotation: its kind (a key of `KINDS`), the file, and the details."""

    kind: str
    where: str
    detail: str


KINDS = {
    "wrong format": "boxes that look like a different format from the one in which they are read",
    "not finite": "boxes with NaN, infinity or a coordinate that is not a number",
    "inverted": "boxes whose right edge is left of their left edge, or whose lower edge is above their upper edge",
    "empty": "boxes less than a pixel wide or high",
    "outside": "boxes wholly outside their image",
    "over the edge": "boxes that reach over the edge of their image; they are clipped",
    "duplicate box": "boxes that occur twice in an image, with the same class",
    "unknown class": "boxes or images of a class without a name",
    "unknown image": "boxes of an image that is not listed",
    "shared id": "images with the same id, so that their boxes cannot be assigned",
    "unreadable annotation": "files or lines that cannot be parsed",
    "missing image": "annotations whose image was not found",
    "other labels": "images that a table lists twice, with different labels",
    "unreadable shard": "tar files that cannot be read, or whose samples lack an image or a class",
    "unreadable image": "images that cannot be opened",
    "wrong size": "images whose size differs from their annotation",
    "no size": "annotations that give a width or height of 0; the size of the image file is used",
    "listed twice": "images that a split or a table lists twice",
    "not annotated": "images that a split lists but that have no annotation",
    "twin": "images with the same content as another image of their split",
    "leak": "images that are in two splits",
    "missing class": "classes of which a split has no image",
}
"""Kind of problem → description, the most serious first."""


@dataclass
class Annotated:
    """An image with its boxes.

    Attributes:
        path: of the image.
        size: (height, width), pixels.
        boxes: (N, 4) float64, xyxy in pixels, inside the image.
        labels: (N,) int64, numbers of the classes.
        crowd: (N,) bool; True for a box around many objects (COCO's iscrowd) or a difficult object (Pascal VOC). Such
            boxes are not trained on, and detections of them count neither as right nor as wrong.
        area: (N,) float64, pixels: the area of each object in the file; if the file has none, the area of the box.
            mAP by object size uses it.
        image_id: the image's id in a COCO file, otherwise a running number.
    """

    path: Path
    size: Size
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    image_id: int


@dataclass
class Entry:
    """An image and its N boxes as an annotation file gives them, in the format of the file.

    Attributes:
        path: of the image; None if the image was not found.
        where: name of the annotation in error messages.
        image_id: the image's id in a COCO file, otherwise a running number.
        stated: (height, width) of the image as the annotation gives it, or None.
        boxes: (N, 4) float64.
        labels: (N,) int64; −1 for an unknown class.
        crowd: (N,) bool, see `Annotated`.
        area: (N,) float64; NaN where the file has none.
        relative: whether coordinates are fractions of the image's width and height.
    """

    path: Path | None
    where: str
    image_id: int
    stated: Size | None
    boxes: NDArray[np.float64]
    labels: NDArray[np.int64]
    crowd: NDArray[np.bool_]
    area: NDArray[np.float64]
    relative: bool = False


@dataclass
class Annotations:
    """The content of annotation files.

    Attributes:
        splits: name → its entries; the name is "" if the files name no splits.
        class_names: in the order of the labels.
        category_ids: number of each class in the files; Pascal VOC has no numbers, so its classes count from 1.
        box_format: format of the entries' boxes.
        problems: problems found so far.
    """

    splits: dict[str, list[Entry]]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    box_format: BoxFormat
    problems: list[Problem] = field(default_factory=list)


def settle(
    annotations: Annotations, size_of: Callable[[Path], Size], *, doubt: bool = True
) -> dict[str, list[Annotated]]:
    """Convert entries to images with usable boxes, and append the problems found to `annotations.problems`.

    Boxes that reach over an edge of the image are clipped; other bad boxes are left out. Images that are missing,
    cannot be opened or differ in size from their annotation are left out with their boxes. Images without boxes are
    kept.

    Args:
        annotations: returned by a reader.
        size_of: returns the (height, width) of an image as it is decoded; raises DataError.
        doubt: check whether the boxes look like another format (default: True).

    Returns:
        Split → its images.
    """
    # an image in two splits has a single entry, so check each entry once
    distinct = {id(entry): entry for entries in annotations.splits.values() for entry in entries}
    sizes = {key: _size(entry, size_of, annotations.problems) for key, entry in distinct.items()}
    if doubt:
        for entries in annotations.splits.values():
            pairs = [(entry, sizes[id(entry)]) for entry in entries]
            annotations.problems += _doubts([(entry, size) for entry, size in pairs if size], annotations.box_format)
    known: dict[int, Annotated] = {}
    settled: dict[str, list[Annotated]] = {}
    for split, entries in annotations.splits.items():
        seen: set[Path] = set()
        settled[split] = []
        for entry in entries:
            size = sizes[id(entry)]
            if size is None or entry.path is None:
                continue
            if entry.path in seen:
                annotations.problems.append(
                    Problem("listed twice", entry.where, f"{entry.path.name} in {split or 'the only split'}")
                )
                continue
            seen.add(entry.path)
            if id(entry) not in known:
                known[id(entry)] = _settled(entry, entry.path, size, annotations)
            settled[split].append(known[id(entry)])
    return settled


def refuse(problems: Sequence[Problem], root: str) -> None:
    """Raise DataError if there are problems; the message has the count of each kind and the first problem."""
    if problems:
        first = problems[0]
        raise DataError(
            f"{root} has {count_kinds(problems)}, e.g. {first.where}: {first.kind}, {first.detail}; `visionattn data "
            f"check {root}` lists all, and the option `bad_boxes: drop` trains without these boxes"
        )


def count_kinds(problems: Iterable[Problem]) -> str:
    """Count problems by kind, as text: `2 empty, 1 leak`."""
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS if counts[kind])


def to_xyxy(boxes_N4: NDArray[np.float64], box_format: BoxFormat) -> NDArray[np.float64]:
    """Convert (N, 4) boxes of a format to xyxy."""
    first_N2, second_N2 = boxes_N4[:, :2], boxes_N4[:, 2:]
    if box_format == "xywh":
        return np.concatenate([first_N2, first_N2 + second_N2], 1)
    if box_format == "cxcywh":
        return np.concatenate([first_N2 - second_N2 / 2, first_N2 + second_N2 / 2], 1)
    return boxes_N4


def visible(boxes_N4: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Return the (N,) mask of xyxy boxes that are at least a pixel wide and high."""
    return np.asarray((boxes_N4[:, 2:] - boxes_N4[:, :2] >= 1).all(1))


def _size(entry: Entry, size_of: Callable[[Path], Size], problems: list[Problem]) -> Size | None:
    """Return the size of an entry's image; if the image cannot be used, append the problem and return None."""
    if entry.path is None:
        detail = (
            "not in the usual folders; give the folder of the images: --images DIR here, --data.images DIR in training"
        )
        problems.append(Problem("missing image", entry.where, detail))
        return None
    try:
        size = size_of(entry.path)
    except DataError as error:
        problems.append(Problem("unreadable image", entry.where, str(error)))
        return None
    if entry.stated and min(entry.stated) > 0 and entry.stated != size:
        stated, actual = (f"{width}×{height}" for height, width in (entry.stated, size))
        detail = f"the annotation gives {stated} pixels (width × height), but {entry.path.name} has {actual}"
        problems.append(Problem("wrong size", entry.where, detail))
        return None
    return size


def _settled(entry: Entry, path: Path, size: Size, annotations: Annotations) -> Annotated:
    scale = np.array([size[1], size[0], size[1], size[0]], float)
    boxes_N4 = to_xyxy(entry.boxes, annotations.box_format) * (scale if entry.relative else 1)
    clipped_N4 = np.clip(boxes_N4, 0, scale)
    with np.errstate(invalid="ignore"):
        sides_N2 = boxes_N4[:, 2:] - boxes_N4[:, :2]
        inner_N2 = clipped_N4[:, 2:] - clipped_N4[:, :2]
        out_N = (abs(boxes_N4 - clipped_N4) > _ROUNDING).any(1)
    keep_N = np.ones(len(boxes_N4), bool)
    known: set[tuple[float, ...]] = set()
    for number in range(len(boxes_N4)):
        kind = None
        key = (float(entry.labels[number]), *boxes_N4[number].tolist())
        if not np.isfinite(boxes_N4[number]).all():
            kind = "not finite"
        elif entry.labels[number] < 0:
            kind = "unknown class"
        elif (sides_N2[number] < 0).any():
            kind = "inverted"
        elif (sides_N2[number] < 1).any():
            kind = "empty"
        elif (inner_N2[number] < 1).any():
            kind = "outside"
        elif key in known:
            kind = "duplicate box"
        known.add(key)
        keep_N[number] = kind is None
        kind = kind or ("over the edge" if out_N[number] else None)
        if kind == "unknown class":
            continue  # the reader has already reported the box with the name of its class
        if kind:
            edges = ", ".join(f"{edge:g}" for edge in np.round(boxes_N4[number], 2))
            detail = f"box {number + 1} ({edges}) in {size[1]}×{size[0]}"
            annotations.problems.append(Problem(kind, entry.where, detail))
    boxes_N4 = clipped_N4[keep_N]
    area_N = np.where(np.isfinite(entry.area[keep_N]), entry.area[keep_N], (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(1))
    return Annotated(path, size, boxes_N4, entry.labels[keep_N], entry.crowd[keep_N], area_N, entry.image_id)


def _doubts(pairs: Sequence[tuple[Entry, Size]], box_format: BoxFormat) -> list[Problem]:
    """Report boxes that fit only another format, fractions that are read as pixels, and pixels read as fractions."""
    pairs = [(entry, size) for entry, size in pairs if len(entry.boxes)]
    if sum(len(entry.boxes) for entry, _ in pairs) < _ENOUGH:
        return []
    boxes_N4 = np.concatenate([entry.boxes for entry, _ in pairs])
    scale_N4 = np.concatenate([np.tile([w, h, w, h], (len(entry.boxes), 1)) for entry, (h, w) in pairs]).astype(float)
    finite_N = np.isfinite(boxes_N4).all(1)
    boxes_N4, scale_N4 = boxes_N4[finite_N], scale_N4[finite_N]
    if len(boxes_N4) < _ENOUGH:
        return []
    relative = pairs[0][0].relative
    fractions = bool((boxes_N4 <= 1.5).all(1).mean() > _PLAUSIBLE)
    if fractions != relative and (fractions or (boxes_N4 > 1.5).any(1).mean() > 0.5):
        names = ("pixels", "fractions of the image")
        read, look = names if fractions else names[::-1]
        remedy = "multiply" if fractions else "divide"
        detail = f"coordinates are read as {read}, but look like {look}; {remedy} them by the image's width and height"
        return [Problem("wrong format", pairs[0][0].where, detail)]

    def plausible(candidate: BoxFormat) -> float:
        """Return the fraction of boxes that, read in this format, lie in their image and are not inverted."""
        edges_N4 = to_xyxy(boxes_N4, candidate) * (scale_N4 if relative else 1)
        inside_N = (edges_N4 >= -1).all(1) & (edges_N4 <= scale_N4 + 1).all(1)
        return float((inside_N & (edges_N4[:, 2:] > edges_N4[:, :2]).all(1)).mean())

    formats: tuple[BoxFormat, ...] = ("xyxy", "xywh", "cxcywh")
    best = max(formats, key=lambda candidate: (plausible(candidate), candidate == box_format))
    if plausible(box_format) < 0.9 and plausible(best) >= _PLAUSIBLE:
        fitting = f"only {plausible(box_format):.0%} of them fit this format, and {plausible(best):.0%} fit {best}"
        detail = f"boxes are read as {box_format}, but {fitting}; set box_format: {best}"
        return [Problem("wrong format", pairs[0][0].where, detail)]
    return []
