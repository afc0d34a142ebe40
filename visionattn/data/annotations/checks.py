"""Check a folder of annotated images for problems. This file does not import torch."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from visionattn.data.annotations.boxes import KINDS, Annotated, BoxFormat, Problem, settle
from visionattn.data.annotations.reading import layout_of, read_annotations
from visionattn.data.decode import read_image
from visionattn.data.placement import Size
from visionattn.errors import DataError

_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112
_T = TypeVar("_T")
_TURNED = (5, 6, 7, 8)  # EXIF orientations for which the upright image has height and width exchanged


Progress = Callable[[Iterable[_T], int], Iterable[_T]]
"""Takes an iterable and the number of its items, yields the items, and shows how many are done."""


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        layout: coco, voc, yolo, folder for images in a folder for each class, table for a table of labels, or shards.
        class_names: in the order of the labels.
        splits: name → its images, with the usable boxes; in the last three layouts, with labels and no boxes.
        problems: all problems found, of boxes, images and splits.
    """

    layout: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Sequence[Annotated]]
    problems: Sequence[Problem]

    def lines(self, limit: int | None = None) -> list[str]:
        """Return the report as lines of text: counts, then at most `limit` problems of each kind (default: all)."""
        text = [f"{self.layout}, {len(self.class_names)} classes: {', '.join(self.class_names)}"]
        for split, images in self.splits.items():
            counts = Counter(int(label) for image in images for label in image.labels)
            classes = ", ".join(f"{name} {counts[number]:,}" for number, name in enumerate(self.class_names))
            start = f"  {split or 'all':<6} {len(images):,} images"
            if self.layout in ("folder", "table", "shards"):
                bare = sum(not len(image.labels) for image in images)
                text.append(f"{start}: {classes}" + (f", {bare:,} without a label" if bare else ""))
                continue
            boxes = sum(len(image.boxes) for image in images)
            empty = [image.path.name for image in images if not len(image.boxes)]
            crowd = sum(int(image.crowd.sum()) for image in images)
            extra = f", {len(empty):,} without boxes" if empty else ""
            extra += f", {crowd:,} crowds" if crowd else ""
            text.append(f"{start}{extra}; {boxes:,} good boxes: {classes}")
            if empty:
                text += ["      without boxes:", *_limited(empty, limit, " " * 8)]
        by_kind: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            by_kind[problem.kind].append(problem)
        count = len(self.problems)
        text.append(f"{count:,} problem{'s' * (count > 1)}" if count else "no problems")
        for kind in KINDS:
            if problems := by_kind[kind]:
                text.append(f"  {len(problems):,} {kind}: {KINDS[kind]}")
                text += _limited_problems(problems, limit)
        return text


def _limited_problems(problems: Sequence[Problem], limit: int | None) -> list[str]:
    """Return lines for at most `limit` problems; a detail that several problems share is written once."""
    by_detail: dict[str, list[str]] = defaultdict(list)
    for problem in problems[:limit]:
        by_detail[problem.detail].append(problem.where)
    text = []
    for detail, places in by_detail.items():
        if len(places) == 1:
            text.append(f"      {places[0]}: {detail}")
        else:
            text += [f"      {detail}:", *(f"        {place}" for place in places)]
    return text + _rest(len(problems), limit, " " * 6)


def _limited(names: Sequence[str], limit: int | None, indent: str) -> list[str]:
    return [f"{indent}{name}" for name in names[:limit]] + _rest(len(names), limit, indent)


def _rest(count: int, limit: int | None, indent: str) -> list[str]:
    return [f"{indent}… and {count - limit:,} more"] if limit is not None and count > limit else []


def check(
    root: str | os.PathLike[str],
    *,
    images: str | None = None,
    class_names: Sequence[str] | None = None,
    splits: Mapping[str, str] | None = None,
    box_format: BoxFormat | None = None,
    progress: Progress[tuple[Path, Size | DataError]] | None = None,
) -> Report:
    """Check annotations for bad boxes, missing images, unknown classes, duplicates, and images in two splits.

    Every image file is decoded in full.

    Args:
        root, images, class_names, splits, box_format: see `read_annotations`.
        progress: shows how many image files are decoded (default: nothing is shown).

    Raises:
        DataError, UsageError: see `read_annotations`.
    """
    annotations = read_annotations(root, images=images, class_names=class_names, splits=splits, box_format=box_format)
    entries = {id(entry): entry for entries in annotations.splits.values() for entry in entries}.values()
    sizes = decoded_sizes([entry.path for entry in entries if entry.path], progress)

    def decoded_size(path: Path) -> Size:
        size = sizes[path]
        if isinstance(size, DataError):
            raise size
        return size

    settled = settle(annotations, decoded_size, doubt=box_format is None)
    zero = [entry for entry in entries if entry.stated and min(entry.stated) <= 0]
    unsized = [Problem("no size", e.where, "{1} × {0} pixels".format(*e.stated)) for e in zero if e.stated]
    paths = [(split, image.path) for split, images_of in settled.items() for image in images_of]
    problems = [*annotations.problems, *unsized, *twins(paths)]
    return Report(layout_of(Path(root)), annotations.class_names, settled, problems)


def decoded_sizes(
    paths: Iterable[Path], progress: Progress[tuple[Path, Size | DataError]] | None = None
) -> dict[Path, Size | DataError]:
    """Decode image files in full, a file for each processor at a time.

    Returns:
        Path → (height, width) of the upright image, or the error of a file that cannot be decoded.
    """
    distinct = list(dict.fromkeys(paths))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(_decoded, distinct)
        return dict(progress(results, len(distinct)) if progress else results)


def _decoded(path: Path) -> tuple[Path, Size | DataError]:
    try:
        height, width, _ = read_image(path).shape
        return path, (height, width)
    except DataError as error:
        return path, error


def size_of(path: Path) -> Size:
    """Read the (height, width) that an image has after decoding, from its header only.

    Raises:
        DataError: the file is not an image, or cannot be opened.
    """
    try:
        with Image.open(path) as image:
            # image.size of a rotated TIFF is already upright in newer releases of Pillow only, so read its tags
            tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
            width, height = tags.get(_WIDTH, image.size[0]), tags.get(_HEIGHT, image.size[1])
            # for a PNG, image.getexif() decodes all pixels to reach metadata after them; Image.Image.getexif does not
            header = image.format == "PNG" and not _says_more(path)
            exif = Image.Image.getexif(image) if header else image.getexif()
            return (width, height) if exif.get(_ORIENTATION) in _TURNED else (height, width)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError) as error:
        raise DataError(f"{path} is not an image that can be read") from error


def _says_more(path: Path) -> bool:
    """Return whether a PNG has metadata after its pixels."""
    with open(path, "rb") as file:
        file.seek(8)
        after_pixels = False
        while len(head := file.read(8)) == 8:
            after_pixels |= head[4:] == b"IDAT"
            if after_pixels and head[4:] in (b"eXIf", b"tEXt", b"zTXt", b"iTXt"):
                return True
            file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR)
    return False


def same_content(paths: Sequence[Path]) -> list[int]:
    """Return for each file the position of the first file with the same content."""
    by_size: dict[int, list[int]] = defaultdict(list)
    for place, path in enumerate(paths):
        by_size[path.stat().st_size].append(place)
    firsts = list(range(len(paths)))
    for places in by_size.values():
        known: dict[bytes, int] = {}
        for place in places if len(places) > 1 else ():  # a file whose length is unique has no copy
            firsts[place] = known.setdefault(hashlib.blake2b(paths[place].read_bytes()).digest(), place)
    return firsts


def twins(images: Sequence[tuple[str, Path]], hashes: Sequence[bytes] | None = None) -> list[Problem]:
    """Report images with the same content: `twin` if both are in one split, `leak` if they are in two splits.

    Args:
        images: (split, path) of each image.
        hashes: of the content of each image (default: the files are read).
    """
    problems = []
    known: dict[bytes, int] = {}
    firsts = (
        same_content([path for _, path in images])
        if hashes is None
        else [known.setdefault(content, place) for place, content in enumerate(hashes)]
    )
    for place, first in enumerate(firsts):
        if first == place:
            continue
        (split, path), (other, twin) = images[place], images[first]
        if split == other:
            problems.append(Problem("twin", str(path), f"has the same content as {twin.name}"))
        else:
            same = f"as {twin.name} " if twin.name != path.name else ""
            problems.append(Problem("leak", str(path), f"in {split}, and {same}in {other}"))
    return problems
