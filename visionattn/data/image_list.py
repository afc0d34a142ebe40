"""Lists of images: CSV or JSONL files with image paths, classes to explain and boxes to draw."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

from visionattn.errors import DataError
from visionattn.files import local_path, printable

LISTS = frozenset({".csv", ".jsonl"})
_BOX = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class ImageRequest:
    """The target and boxes that a list gives for an image.

    Attributes:
        target: number or name of the class to explain (`class_index` reads text); None for the target that the run sets
            for all images.
        boxes: xyxy in pixels of the source, drawn on the outputs.
        labels: one per box, or empty.
    """

    target: int | str | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    labels: tuple[str, ...] = ()

    def __add__(self, other: "ImageRequest") -> "ImageRequest":
        """Merge two lines of the same image: keep the boxes of both.

        Raises:
            ValueError: the lines have different targets.
        """
        if None not in (self.target, other.target) and self.target != other.target:
            raise ValueError(
                f"is listed with the targets {self.target} and {other.target}, and a run explains one target of an "
                "image; put the second into another list, and export that to another folder"
            )
        target = self.target if other.target is None else other.target
        return ImageRequest(target, self.boxes + other.boxes, self.labels + other.labels)


def read_list(path: str) -> Iterator[tuple[str, ImageRequest | None]]:
    """Yield (absolute path, request) of each listed image; the request is None if the line has only a path.

    Relative paths are relative to the list's folder. A .csv has the column `path` and the optional columns `target`,
    `x0`, `y0`, `x1`, `y1` and `label`, one box per line; without a header, each line is a path. A .jsonl has the key
    `path` and the optional keys `target`, `boxes` and `labels`. The manifest of another run can also serve as a list:
    its lines have `source` in place of `path`, and only the paths are used.

    Raises:
        DataError: the list cannot be read, or a line has no path or a wrong value; the message gives the line number.
    """
    folder = os.path.dirname(path)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = _rows_of_csv(file) if path.lower().endswith(".csv") else _objects(file)
            for number, line in lines:
                try:
                    yield (
                        os.path.normpath(os.path.join(folder, local_path(_text(line, "path", "source")))),
                        _request(line),
                    )
                except (ValueError, TypeError, KeyError) as error:
                    raise DataError(f"{printable(path)}, line {number}: {_reason(error)}") from error
    except (OSError, csv.Error, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{printable(path)} cannot be read as a list of images: {reason}") from error


def _rows_of_csv(file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    rows = csv.reader(file)
    header: Sequence[str] | None = None
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if header is None:
            names = [cell.strip().lower() for cell in row]
            header = names if "path" in names else ["path"]
            if header is names:
                continue
        yield rows.line_num, {name: cell for name, cell in zip(header, row, strict=False) if cell.strip()}


def _objects(file: TextIO) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            value = json.loads(line)
            yield number, value if isinstance(value, dict) else {"path": value}


def _request(line: dict[str, Any]) -> ImageRequest | None:
    if "path" not in line:
        return None  # a line of a manifest, whose target is that of another run
    target = line.get("target")
    if isinstance(target, str):
        target = target.strip()
    if target is not None and (isinstance(target, bool) or not isinstance(target, (int, str))):
        raise ValueError(f"target must be a number or a class name, got {target!r}")
    boxes = line.get("boxes", [])
    if any(edge in line for edge in _BOX):
        boxes = [[line[edge] for edge in _BOX]]
    labels = line.get("labels", [line["label"]] if "label" in line and boxes else [])
    boxes = tuple(tuple(float(edge) for edge in box) for box in boxes)
    if any(len(box) != 4 for box in boxes) or len(labels) not in (0, len(boxes)):
        raise ValueError("a box must be x0, y0, x1, y1, with one label per box or no labels")
    request = ImageRequest(target, boxes, tuple(map(str, labels)))
    return None if request == ImageRequest() else request


def _text(line: dict[str, Any], *keys: str) -> str:
    for key in keys:
        if isinstance(line.get(key), str) and line[key].strip():
            return str(line[key])
    raise ValueError(f"there is no {keys[0]}")


def _reason(error: Exception) -> str:
    return f"there is no {error.args[0]}" if isinstance(error, KeyError) else str(error)
