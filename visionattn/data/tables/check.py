"""Check a table of image paths and labels."""

import os
from pathlib import Path

import numpy as np

from visionattn.data.annotations.boxes import Annotated, Problem
from visionattn.data.annotations.checks import Progress, Report, decoded_sizes, twins
from visionattn.data.placement import Size
from visionattn.data.tables.reading import Columns, find_columns, read_table
from visionattn.errors import DataError


def check_table(
    file: str | os.PathLike[str],
    columns: Columns | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    progress: Progress[tuple[Path, Size | DataError]] | None = None,
) -> Report:
    """Check a table: rows that cannot be used, damaged images, duplicates, leaks between splits and missing classes.

    Every image file is decoded in full.

    Args:
        file: see `read_table`.
        columns: their names (default: those that `find_columns` returns).
        root: folder to which the paths in the table are relative (default: the table's folder).
        progress: shows how many image files are decoded (default: nothing is shown).

    Raises:
        DataError: the table cannot be read, has no rows, or lacks a column.
    """
    table = read_table(file, columns or find_columns(file), root=root)
    numbers = {name: number for number, name in enumerate(table.class_names)}
    sizes = decoded_sizes([row.path for row in table.rows], progress)
    problems = list(table.problems)
    splits: dict[str, list[Annotated]] = {}
    for row in table.rows:
        images = splits.setdefault(row.split or "", [])
        size = sizes[row.path]
        if isinstance(size, DataError):
            problems.append(Problem("unreadable image", row.place, str(size)))
            continue
        labels = np.array([numbers[label] for label in row.labels], np.int64)
        none = np.zeros(0)
        images.append(Annotated(row.path, size, np.zeros((0, 4)), labels, none.astype(bool), none, 0))
    for split, images in splits.items():
        there = {int(label) for image in images for label in image.labels}
        missing = [name for name, number in numbers.items() if number not in there]
        problems += [Problem("missing class", name, f"in {split or 'all rows'}") for name in missing]
    problems += twins([(split, image.path) for split, images in splits.items() for image in images])
    return Report("table", table.class_names, splits, problems)
