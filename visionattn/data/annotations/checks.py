"""Check a folder of annotated images for problems, without training on it; no torch."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import TiffImageFile

from visionattn.data.annotations.boxes import KINDS, Annotated, BoxFormat, Problem, settle
from visionattn.data.annotations.reading import layout_of, read_annotations
from visionattn.data.placement import Size
from visionattn.errors import DataError

_WIDTH, _HEIGHT, _ORIENTATION = 0x0100, 0x0101, 0x0112
_TURNED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width


@dataclass(frozen=True)
class Report:
    """The result of a check.

    Attributes:
        layout: coco, voc or yolo.
        class_names: in the order of the labels.
        splits: name → its images, with the boxes that can be trained on.
        problems: bad boxes and everything else that is wrong.
    """

    layout: str
    class_names: tuple[str, ...]
    splits: Mapping[str, Sequence[Annotated]]
    problems: Sequence[Problem]

    def lines(self, limit: int | None = None) -> list[str]:
        """Return the report as lines of text: counts, then each problem, at most `limit` of a kind (default: all)."""
        text = [f"{self.layout}, {len(self.class_names)} classes: {', '.join(self.class_names)}"]
        for split, images in self.splits.items():
            boxes = sum(len(image.boxes) for image in images)
            empty = sum(not len(image.boxes) for image in images)
            crowd = sum(int(image.crowd.sum()) for image in images)
            counts = Counter(int(label) for image in images for label in image.labels)
            classes = ", ".join(f"{name} {counts[number]:,}" for number, name in enumerate(self.class_names))
            extra = f", {empty:,} without boxes" if empty else ""
            extra += f", {crowd:,} crowds" if crowd else ""
            text.append(f"  {split or 'all':<6} {len(images):,} images{extra}; {boxes:,} good boxes: {classes}")
        by_kind: dict[str, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            by_kind[problem.kind].append(problem)
        count = len(self.problems)
        text.append(f"{count:,} problem{'s' * (count > 1)}" if count else "no problems")
        for kind in KINDS:
            if problems := by_kind[kind]:
                text.append(f"  {len(problems):,} {kind}: {KINDS[kind]}")
                text += [f"      {problem.where}: {problem.detail}" for problem in problems[:limit]]
                if limit is not None and len(problems) > limit:
                    text.append(f"      … and {len(problems) - limit:,} more")
        return text


def check(
    root: str | os.PathLike[str],
    *,
    images: str | None = None,
    class_names: Sequence[str] | None = None,
    splits: Mapping[str, str] | None = None,
    box_format: BoxFormat | None = None,
) -> Report:
    """Check annotations for bad boxes, missing images, unknown classes, duplicates, and images in two splits.

    Args:
        root, images, class_names, splits, box_format: see `read_annotations`.

    Raises:
        DataError, UsageError: see `read_annotations`.
    """
    annotations = read_annotations(root, images=images, class_names=class_names, splits=splits, box_format=box_format)
    settled = settle(annotations, size_of, doubt=box_format is None)
    paths = [(split, image.path) for split, entries in settled.items() for image in entries]
    problems = [*annotations.problems, *_twins(paths)]
    return Report(layout_of(Path(root)), annotations.class_names, settled, problems)


def size_of(path: Path) -> Size:
    """Read the (height, width) that an image has after decoding, from its header only.

    Raises:
        DataError: the file is not an image, or cannot be opened.
    """
    try:
        with Image.open(path) as image:
            # newer releases of Pillow already exchange the sides of a rotated TIFF, so read the sides from its tags
            tags = image.tag_v2 if isinstance(image, TiffImageFile) else {}
            width, height = tags.get(_WIDTH, image.size[0]), tags.get(_HEIGHT, image.size[1])
            # Pillow would decode the whole PNG to look for metadata after the pixels
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
        for place in places if len(places) > 1 else ():  # files of different length differ
            firsts[place] = known.setdefault(hashlib.blake2b(paths[place].read_bytes()).digest(), place)
    return firsts


def _twins(images: Sequence[tuple[str, Path]]) -> list[Problem]:
    """Report images with the same content: as twins within a split, as leaks between two splits."""
    problems = []
    for place, first in enumerate(same_content([path for _, path in images])):
        if first == place:
            continue
        (split, path), (other, twin) = images[place], images[first]
        if split == other:
            problems.append(Problem("twin", str(path), f"is the same as {twin.name}"))
        else:
            same = f"as {twin.name} " if twin.name != path.name else ""
            problems.append(Problem("leak", str(path), f"in {split}, and {same}in {other}"))
    return problems
