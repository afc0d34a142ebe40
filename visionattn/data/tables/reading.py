"""Read tables of image paths and labels: CSV, TSV and Parquet files. This file does not import torch."""

import csv
import math
import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from visionattn.data.annotations.boxes import Problem, count_kinds
from visionattn.data.annotations.parsing import SPLITS
from visionattn.errors import DataError, UsageError, nearest
from visionattn.files import local_path, natural_key, printable

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_PARQUET = frozenset({".parquet", ".pq"})
TABLES = frozenset({*_DELIMITERS, *_PARQUET})
"""Suffixes (lower case) of the files that can be read as tables."""

_YES = frozenset({"1", "1.0", "true", "yes"})
_NO = frozenset({"0", "0.0", "false", "no", ""})
_HARMLESS = frozenset({"listed twice"})  # kinds of problems with which a training can start


@dataclass(frozen=True)
class Columns:
    """The columns of a table.

    Attributes:
        path: column of the image's path.
        labels: column of the label, or of several labels with a `separator` between them; or a list of columns, one for
            each class, with 1 where the image has the label, and 0 or nothing where not.
        split: column of the split, which the table may lack: train, val or test, or another name in `SPLITS`.
        separator: text between the labels of an image; None if every image has exactly one label.
    """

    path: str = "path"
    labels: str | Sequence[str] = "label"
    split: str = "split"
    separator: str | None = None

    @property
    def several(self) -> bool:
        """Whether an image can have several labels, or none."""
        return self.separator is not None or not isinstance(self.labels, str)


@dataclass(frozen=True)
class Row:
    """An image of a table.

    Attributes:
        place: number of its line, or of its row in a Parquet file, from 1: `line 7`, `row 7`.
        path: absolute or relative to the current folder.
        labels: names of its classes.
        split: train, val or test; None if the table does not say.
    """

    place: str
    path: Path
    labels: tuple[str, ...]
    split: str | None


@dataclass
class Table:
    """The content of a table.

    Attributes:
        file: path of the table.
        class_names: names of all classes.
        rows: the first usable row of each image.
        problems: problems found, whose `where` is the place of the row.
    """

    file: str
    class_names: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    def refuse(self) -> None:
        """Raise DataError if there are problems; the message has the first problem and the count of each kind."""
        if problems := [problem for problem in self.problems if problem.kind not in _HARMLESS]:
            first = problems[0]
            rest = f" (in total: {count_kinds(problems)})" if len(problems) > 1 else ""
            raise DataError(
                f"{printable(self.file)}, {first.where}: {first.detail}{rest}; correct the table; `visionattn data "
                f"check {printable(self.file)}` lists every problem"
            )


def is_table(path: str | os.PathLike[str]) -> bool:
    """Return whether a file has the suffix of a table."""
    return Path(path).suffix.lower() in TABLES


def find_columns(
    file: str | os.PathLike[str],
    *,
    path: str = "path",
    labels: str | Sequence[str] | None = None,
    split: str = "split",
    separator: str | None = None,
) -> Columns:
    """Return the columns of a table, of which only its header is read.

    Args:
        file: see `read_table`.
        path, split: see `Columns`.
        labels: see `Columns` (default: `labels` if the table has this column, otherwise `label`).
        separator: text between the labels of an image (default: | in the column `labels`, otherwise None).

    Raises:
        UsageError, DataError: as for `read_table`, if the header cannot be read.
    """
    if labels is None:
        labels = "labels" if "labels" in _content(_table_file(file), ())[0] else "label"
    if separator is None and labels == "labels":
        separator = "|"
    return Columns(path, labels, split, separator)


def read_table(
    file: str | os.PathLike[str],
    columns: Columns,
    *,
    root: str | os.PathLike[str] | None = None,
    class_names: Sequence[str] | None = None,
) -> Table:
    """Read a table with one image in each row.

    Args:
        file: a .csv or .tsv file, whose first line names the columns, or a .parquet file. In Parquet, the labels of an
            image can also be a list of names.
        columns: their names.
        root: folder to which paths in the table are relative (default: the folder of the table).
        class_names: the valid labels, in the order of their numbers (default: all labels of the table, in natural
            order; with a list of columns, the names of the columns).

    Raises:
        UsageError: a path is an address such as s3://bucket/labels.csv.
        DataError: the table cannot be read, has no rows, or lacks a column. Problems of single rows are in `problems`.
    """
    name = _table_file(file)
    home = Path(local_path(root)) if root is not None else Path(name).parent
    if root is not None and not home.is_dir():
        raise DataError(f"there is no folder {printable(home)}, to which the paths in {printable(name)} are relative")
    of_labels = [columns.labels] if isinstance(columns.labels, str) else list(columns.labels)
    names, records = _content(name, {columns.path, columns.split, *of_labels})
    for wanted in (columns.path, *of_labels):
        if wanted not in names:
            raise DataError(
                f"{printable(name)} has no column {wanted!r}, but {', '.join(map(repr, names))}; name the columns in "
                f"the config, or by the options of data check.{nearest(wanted, names)}"
            )
    if not records:
        raise DataError(f"{printable(name)} names no images: it has a header and no rows")
    table = Table(name, ())
    known = None if class_names is None else set(class_names)
    if not isinstance(columns.labels, str):
        class_names = of_labels if class_names is None else class_names
    elif class_names is None:
        found = {label for _, record in records for label in _labels(record, columns)}
        class_names = sorted(found, key=natural_key)
    table.class_names = tuple(class_names)
    by_path: dict[str, Row] = {}
    for place, record in records:
        try:
            row = _row(place, record, columns, home)
        except (DataError, UsageError) as error:
            table.problems.append(Problem("unreadable annotation", place, str(error)))
            continue
        unknown = [label for label in row.labels if known is not None and label not in known]
        path = os.path.normpath(row.path)
        earlier = by_path.setdefault(path, row)
        if problem := _problem(row, earlier, unknown, columns, table.class_names):
            table.problems.append(problem)
            if earlier is row:
                del by_path[path]
    table.rows = list(by_path.values())
    return table


def _table_file(file: str | os.PathLike[str]) -> str:
    """Return the path of a table as text.

    Raises:
        UsageError: the path is an address.
        DataError: there is no such file, or its suffix is not one of a table.
    """
    name = local_path(file)
    if not os.path.isfile(name):
        siblings = os.listdir(Path(name).parent) if Path(name).parent.is_dir() else []
        raise DataError(f"there is no table {printable(name)}.{nearest(Path(name).name, siblings)}")
    if not is_table(name):
        raise DataError(
            f"{printable(name)} cannot be read as a table; its name must end in {', '.join(sorted(TABLES))}"
        )
    return name


def _row(place: str, record: dict[str, object], columns: Columns, home: Path) -> Row:
    """Return the row of a record; raise DataError if its path, labels or split cannot be read."""
    path = _text(record.get(columns.path))
    if not path:
        raise DataError(f"there is no {columns.path}")
    labels = _labels(record, columns, strict=True)
    if not labels and not columns.several:
        raise DataError(f"there is no {columns.labels} for {printable(path)}")
    split = _text(record.get(columns.split))
    if split and split.lower() not in SPLITS:
        raise DataError(f"the {columns.split} is {split!r}, and must be one of {', '.join(SPLITS)}")
    return Row(place, home / local_path(path), labels, SPLITS[split.lower()] if split else None)


def _problem(
    row: Row, earlier: Row, unknown: Sequence[str], columns: Columns, class_names: Sequence[str]
) -> Problem | None:
    """Return the problem of a row, given the first row with the same path (which may be the same row)."""
    name = printable(row.path)
    if unknown:
        detail = f"there is no class {unknown[0]!r}.{nearest(unknown[0], class_names)}".rstrip(".")
        return Problem("unknown class", row.place, detail)
    if not row.path.is_file():
        return Problem("missing image", row.place, f"there is no image {name}")
    if earlier is row:
        return None
    if set(earlier.labels) != set(row.labels):
        own, other = (" and ".join(labels) or "no label" for labels in (row.labels, earlier.labels))
        return Problem("other labels", row.place, f"{name} has {own}, and in {earlier.place} {other}")
    if earlier.split != row.split:
        own_split, other_split = (split or "no split" for split in (row.split, earlier.split))
        return Problem("leak", row.place, f"{name} is in {own_split}, and in {earlier.place} in {other_split}")
    return Problem("listed twice", row.place, f"{name} is also in {earlier.place}")


def _labels(record: dict[str, object], columns: Columns, *, strict: bool = False) -> tuple[str, ...]:
    """Return the labels of a record, each once.

    Raises:
        DataError: with `strict`, if a column of a class has something other than 0 and 1.
    """
    if not isinstance(columns.labels, str):
        cells = {name: _text(record.get(name)).lower() for name in columns.labels}
        odd = [name for name, cell in cells.items() if cell not in _YES | _NO]
        if odd and strict:
            raise DataError(f"the column {odd[0]!r} must have 0 or 1, got {cells[odd[0]]!r}")
        return tuple(name for name, cell in cells.items() if cell in _YES)
    value = record.get(columns.labels)
    if isinstance(value, (list, tuple)):
        parts = [_text(part) for part in value]
    else:
        text = _text(value)
        parts = text.split(columns.separator) if columns.separator else [text]
    return tuple(dict.fromkeys(part.strip() for part in parts if part.strip()))


def _text(value: object) -> str:
    """Return the content of a cell as text: "" for an empty cell, and whole numbers without a decimal point."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bytes):
        value = os.fsdecode(value)
    return str(value).strip()


_Records = list[tuple[str, dict[str, object]]]


def _content(path: str, wanted: Collection[str]) -> tuple[list[str], _Records]:
    """Return the names of all columns, and of each row its place in the file and its values in the wanted columns.

    Without wanted columns, only the names are read.
    """
    suffix = Path(path).suffix.lower()
    return _parquet(path, wanted) if suffix in _PARQUET else _csv(path, _DELIMITERS[suffix], wanted)


def _csv(path: str, delimiter: str, wanted: Collection[str]) -> tuple[list[str], _Records]:
    """Read a CSV or TSV file, see `_content`; lines without text are skipped."""
    try:
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            lines = csv.reader(file, delimiter=delimiter)
            filled: Iterable[tuple[int, list[str]]] = (
                (lines.line_num, line) for line in lines if any(cell.strip() for cell in line)
            )
            header = [cell.strip() for cell in next(iter(filled), (0, []))[1]]
            records: _Records = []
            for number, line in filled if wanted else ():
                if len(line) != len(header):
                    remedy = "put cells that contain the delimiter into quotation marks"
                    if len(line) < len(header):
                        remedy = "add the missing cells, which may be empty"
                    raise DataError(
                        f"{printable(path)}, line {number}: there are {len(line)} cells and {len(header)} columns; "
                        f"{remedy}"
                    )
                records.append((f"line {number}", dict(zip(header, line, strict=True))))
    except (OSError, csv.Error) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"{printable(path)} cannot be read as a table: {reason}") from error
    if not header:
        raise DataError(f"{printable(path)} is empty; its first line must name the columns")
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise DataError(f"{printable(path)} has two columns {twice[0]!r}; rename one")
    return header, records


def _parquet(path: str, wanted: Collection[str]) -> tuple[list[str], _Records]:
    """Read a Parquet file, see `_content`."""
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise UsageError(
            f"{printable(path)} needs pyarrow: pip install 'visionattn[parquet]', or write the table as .csv"
        ) from error
    try:
        with open(path, "rb") as handle:
            file = parquet.ParquetFile(handle)
            names = list(file.schema_arrow.names)
            records = file.read(columns=[name for name in names if name in wanted]).to_pylist() if wanted else []
    except (OSError, ArrowException) as error:
        raise DataError(f"{printable(path)} cannot be read as a Parquet file: {str(error).splitlines()[0]}") from error
    return names, [(f"row {number}", record) for number, record in enumerate(records, 1)]
