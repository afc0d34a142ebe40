"""Boxes as they are trained on, and all that can be wrong with those in files; no torch.

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
"""Corners; a corner and the size; the centre and the size."""

_ROUNDING = 0.5  # pixels that a box may reach out of its image before that is told; it is cut in any case
_PLAUSIBLE = 0.98  # share of boxes that make sense in the right format
_ENOUGH = 8  # boxes, before a format is doubted


class Problem(NamedTuple):
    """Something wrong with an annotation: what kind, in which file, and the details."""

    kind: str
    where: str
    detail: str


KINDS = {
    "wrong format": "boxes that look like another format than they are read as",
    "not finite": "boxes with NaN, infinity or no number",
    "inverted": "boxes whose right edge is left of the left one, or the lower above the upper",
    "empty": "boxes less than a pixel wide or high",
    "outside": "boxes wholly outside of their image",
    "over the edge": "boxes that reach out of their image; cut there",
    "duplicate box": "boxes that an image has twice, with the same class",
    "unknown class": "boxes of a class that is not among the names",
    "unknown image": "boxes of an image that is not listed",
    "shared id": "images that have their id together, so that nobody knows which boxes are whose",
    "unreadable annotation": "files or lines that cannot be parsed",
    "missing image": "annotations without their image",
    "unreadable image": "images that cannot be opened",
    "wrong size": "images of another size than their annotation says",
    "listed twice": "images that a split lists twice",
    "not annotated": "images that a split lists and nobody annotated",
    "twin": "images with the same content as another of their split",
    "leak": "images that are in two splits",
}
"""Kinds of problems, the gravest first."""


@dataclass
class Annotated:
    """An image with its boxes.

    Attributes:
        path: of the image.
        size: (height, width).
        boxes: (N, 4) float64, xyxy in pixels, inside of the image.
        labels: (N,) int64, numbers of classes.
        crowd: (N,) bool: many objects in one box (COCO's iscrowd), or one too difficult (Pascal VOC): neither trained
            on nor asked for.
        area: (N,) float64, of the objects as the file says, or of the boxes; mAP by size needs it.
        image_id: the file's own number of the image.
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
    """An image and its boxes as a file has them; N boxes, in the format of the file.

    Attributes:
        path: of the image; None where it was not found.
        where: the annotation, for messages.
        stated: (height, width) in the file, where it says so.
        relative: whether coordinates are shares of width and height.
        labels: −1 for an unknown class.
        area: NaN where the file has none.
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
    """What a reader found in files.

    Attributes:
        splits: name → its entries; the name is "" where the files name none.
        class_names: in the order of the labels.
        category_ids: the files' own number of each class.
        box_format: of the entries' boxes.
    """

    splits: dict[str, list[Entry]]
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    box_format: BoxFormat
    problems: list[Problem] = field(default_factory=list)


def settle(found: Annotations, size_of: Callable[[Path], Size], *, doubt: bool = True) -> dict[str, list[Annotated]]:
    """Turn entries into boxes that can be trained on; what cannot is left out and told in `found.problems`.

    Boxes that reach over the edge are cut there; images that are missing, cannot be opened or have another size than
    the annotation says are left out with their boxes, and images without boxes are kept.

    Args:
        found: what a reader found.
        size_of: the (height, width) of an image as it is decoded; raises DataError.
        doubt: ask whether the boxes look like another format.
    """
    distinct = {id(entry): entry for some in found.splits.values() for entry in some}  # a leak stands in two splits
    sizes = {key: _size(entry, size_of, found.problems) for key, entry in distinct.items()}
    if doubt:
        for some in found.splits.values():
            pairs = [(entry, sizes[id(entry)]) for entry in some]
            found.problems += _doubts([(entry, size) for entry, size in pairs if size], found.box_format)
    known: dict[int, Annotated] = {}
    settled: dict[str, list[Annotated]] = {}
    for split, entries in found.splits.items():
        seen: set[Path] = set()
        settled[split] = []
        for entry in entries:
            size = sizes[id(entry)]
            if size is None or entry.path is None:
                continue
            if entry.path in seen:
                found.problems.append(Problem("listed twice", entry.where, f"{entry.path.name} in {split or 'it'}"))
                continue
            seen.add(entry.path)
            if id(entry) not in known:
                known[id(entry)] = _settled(entry, entry.path, size, found)
            settled[split].append(known[id(entry)])
    return settled


def refuse(problems: Sequence[Problem], root: str) -> None:
    """Raise DataError where there are problems: how many of each kind, and the first."""
    if problems:
        first = problems[0]
        raise DataError(
            f"{root} has {told(problems)}, e.g. {first.where}: {first.kind}, {first.detail}; `visionattn data check "
            f"{root}` lists them, and bad_boxes: drop trains without them"
        )


def told(problems: Iterable[Problem]) -> str:
    """Problems by their kind, with counts: `2 empty, 1 leak`."""
    counts = Counter(problem.kind for problem in problems)
    return ", ".join(f"{counts[kind]:,} {kind}" for kind in KINDS if counts[kind])


def to_xyxy(boxes_N4: NDArray[np.float64], box_format: BoxFormat) -> NDArray[np.float64]:
    """Boxes of a format as corners."""
    first_N2, second_N2 = boxes_N4[:, :2], boxes_N4[:, 2:]
    if box_format == "xywh":
        return np.concatenate([first_N2, first_N2 + second_N2], 1)
    if box_format == "cxcywh":
        return np.concatenate([first_N2 - second_N2 / 2, first_N2 + second_N2 / 2], 1)
    return boxes_N4


def visible(boxes_N4: NDArray[np.floating]) -> NDArray[np.bool_]:
    """(N,): which boxes, cut at the edges of their image, are at least a pixel wide and high."""
    return np.asarray((boxes_N4[:, 2:] - boxes_N4[:, :2] >= 1).all(1))


def _size(entry: Entry, size_of: Callable[[Path], Size], problems: list[Problem]) -> Size | None:
    if entry.path is None:
        problems.append(
            Problem(
                "missing image", entry.where, "its image is in none of the usual folders; images: DIR names another"
            )
        )
        return None
    try:
        size = size_of(entry.path)
    except DataError as error:
        problems.append(Problem("unreadable image", entry.where, str(error)))
        return None
    if entry.stated and min(entry.stated) > 0 and entry.stated != size:
        says, has = (f"{height}×{width}" for height, width in (entry.stated, size))
        problems.append(Problem("wrong size", entry.where, f"says {says} pixels, and {entry.path.name} has {has}"))
        return None
    return size


def _settled(entry: Entry, path: Path, size: Size, found: Annotations) -> Annotated:
    scale = np.array([size[1], size[0], size[1], size[0]], float)
    boxes_N4 = to_xyxy(entry.boxes, found.box_format) * (scale if entry.relative else 1)
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
            continue  # the reader has told it, with the name
        if kind:
            edges = ", ".join(f"{edge:g}" for edge in np.round(boxes_N4[number], 2))
            detail = f"box {number + 1} ({edges}) in {size[1]}×{size[0]}"
            found.problems.append(Problem(kind, entry.where, detail))
    boxes_N4 = clipped_N4[keep_N]
    area_N = np.where(np.isfinite(entry.area[keep_N]), entry.area[keep_N], (boxes_N4[:, 2:] - boxes_N4[:, :2]).prod(1))
    return Annotated(path, size, boxes_N4, entry.labels[keep_N], entry.crowd[keep_N], area_N, entry.image_id)


def _doubts(pairs: Sequence[tuple[Entry, Size]], box_format: BoxFormat) -> list[Problem]:
    """Say whether most boxes make sense in another format only, or are shares where pixels are due, or the reverse."""
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
    shares = bool((boxes_N4 <= 1.5).all(1).mean() > _PLAUSIBLE)
    if shares != relative and (shares or (boxes_N4 > 1.5).any(1).mean() > 0.5):
        read, look, mend = (
            ("pixels", "shares of the image", "multiply") if shares else ("shares of the image", "pixels", "divide")
        )
        detail = f"coordinates are read as {read}, and look like {look}; {mend} them by its width and height"
        return [Problem("wrong format", pairs[0][0].where, detail)]

    def sensible(some: BoxFormat) -> float:
        edges_N4 = to_xyxy(boxes_N4, some) * (scale_N4 if relative else 1)
        inside_N = (edges_N4 >= -1).all(1) & (edges_N4 <= scale_N4 + 1).all(1)
        return float((inside_N & (edges_N4[:, 2:] > edges_N4[:, :2]).all(1)).mean())

    formats: tuple[BoxFormat, ...] = ("xyxy", "xywh", "cxcywh")
    best = max(formats, key=lambda some: (sensible(some), some == box_format))
    if sensible(box_format) < 0.9 and sensible(best) >= _PLAUSIBLE:
        share = f"{sensible(best):.0%} make sense as {best} only"
        detail = f"boxes are read as {box_format}, and {share}; set box_format: {best}"
        return [Problem("wrong format", pairs[0][0].where, detail)]
    return []
