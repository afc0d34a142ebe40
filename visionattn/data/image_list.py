"""Lists of images: a CSV or JSONL file that names them, and may say what to explain and what to draw in each."""

import csv
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from visionattn.errors import DataError
from visionattn.files import printable

LISTS = frozenset({".csv", ".jsonl"})
_BOX = ("x0", "y0", "x1", "y1")


@dataclass(frozen=True)
class Wish:
    """What a list says of an image.

    Attributes:
        target: the output to explain, its number or its class name; None for the one the run explains.
        boxes: xyxy in pixels of the source, drawn on its pictures.
        labels: one a box, or none.
    """

    target: int | str | None = None
    boxes: tuple[tuple[float, ...], ...] = ()
    labels: tuple[str, ...] = ()

    def __add__(self, other: "Wish") -> "Wish":
        """Both: an image may have several lines, a box each."""
        target = self.target if other.target is None else other.target
        return Wish(target, self.boxes + other.boxes, self.labels + other.labels)


def read_list(path: str) -> Iterator[tuple[str, Wish | None]]:
    """Yield the absolute paths that a list names, and what it says of them; relative ones start at the list's folder.

    A .csv has the columns `path` and, where wanted, `target`, `x0`, `y0`, `x1`, `y1` and `label`, and a line a box;
    without a header, each line is a path. A .jsonl has the keys `path` and, where wanted, `target`, `boxes` and
    `labels`; or `source`, so that the manifest of another run is a list.

    Raises:
        DataError: it cannot be read, or a line names no image; tells which.
    """
    folder = os.path.dirname(path)
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = _rows_of_csv(file) if path.lower().endswith(".csv") else _objects(file)
            for number, line in lines:
                try:
                    yield os.path.normpath(os.path.join(folder, _text(line, "path", "source"))), _wish(line)
                except (ValueError, TypeError, KeyError) as error:
                    raise DataError(f"{printable(path)}, line {number}: {_words(error)}") from error
    except (OSError, csv.Error, json.JSONDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{printable(path)} cannot be read as a list of images: {reason}") from error


def _rows_of_csv(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
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


def _objects(file: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            value = json.loads(line)
            yield number, value if isinstance(value, dict) else {"path": value}


def _wish(line: dict[str, Any]) -> Wish | None:
    if "path" not in line:
        return None  # a manifest's line: its target was another run's
    target = line.get("target")
    if isinstance(target, str) and target.strip().isdecimal():
        target = int(target)
    if target is not None and (isinstance(target, bool) or not isinstance(target, (int, str))):
        raise ValueError(f"target must be a number or a class name, got {target!r}")
    boxes = line.get("boxes", [])
    if any(edge in line for edge in _BOX):
        boxes = [[line[edge] for edge in _BOX]]
    labels = line.get("labels", [line["label"]] if "label" in line and boxes else [])
    boxes = tuple(tuple(float(edge) for edge in box) for box in boxes)
    if any(len(box) != 4 for box in boxes) or len(labels) not in (0, len(boxes)):
        raise ValueError("a box is x0, y0, x1, y1, and there is one label a box, or none")
    wish = Wish(target, boxes, tuple(map(str, labels)))
    return None if wish == Wish() else wish


def _text(line: dict[str, Any], *keys: str) -> str:
    for key in keys:
        if isinstance(line.get(key), str) and line[key].strip():
            return str(line[key])
    raise ValueError(f"there is no {keys[0]}")


def _words(error: Exception) -> str:
    return f"there is no {error.args[0]}" if isinstance(error, KeyError) else str(error)
