"""`metrics.csv` of a run: one row per logged step, without lost rows when the run is killed and continued."""

import csv
import io
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from visionattn.errors import DataError
from visionattn.files import write_file

NAME = "metrics.csv"
_ROWS = 100  # kept in memory before they are written


class MetricsFile(Logger):
    """A Lightning logger that writes `metrics.csv`.

    Lightning's CSVLogger deletes an earlier file of the same run and rewrites the file in place for each new column.
    This logger appends to the rows of an earlier process, and the file is complete at any moment.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / NAME
        self._columns: list[str] = []
        self._waiting: list[dict[str, object]] = []
        self._seam: int | None = None  # the last step of an earlier process
        self._at_seam: list[set[str]] = []  # the columns of its rows

    @property
    def name(self) -> str:
        return self.path.parent.parent.name

    @property
    def version(self) -> str:
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: "dict[str, object] | Namespace", *args: object, **kwargs: object) -> None:
        """Do nothing, because config.yaml has them."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row; rows are written when a hundred are waiting, at a checkpoint, and at the end."""
        row: dict[str, object] = {"step": step, **metrics}
        if step == self._seam and row.keys() in self._at_seam:
            return  # a repeated validation
        self._waiting.append(row)
        if len(self._waiting) >= _ROWS:
            self.save()

    @rank_zero_only
    def continue_at(self, step: int) -> None:
        """Keep an earlier process's rows of the steps before `step`; the others are dropped and logged again."""
        rows = [row for row in _read(self.path) if int(row["step"]) < step]
        self._seam, self._at_seam = step - 1, [set(row) for row in rows if int(row["step"]) == step - 1]
        self._columns = sorted({column for row in rows for column in row})
        self._replace(rows)

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are kept in memory.

        Raises:
            DataError: the file cannot be written; its earlier rows are unchanged.
        """
        rows, self._waiting = self._waiting, []
        self._columns = self._columns or _columns(self.path)  # a test after the training finds the columns in the file
        columns = sorted({*self._columns, *(column for row in rows for column in row)})
        if not rows:
            return
        if columns == self._columns and self.path.exists():
            _append(self.path, _text(columns, rows))
            return
        self._columns = columns
        self._replace([*_read(self.path), *rows])

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self.save()

    def _replace(self, rows: Sequence[Mapping[str, object]]) -> None:
        if rows or self.path.exists():
            header = ",".join(self._columns) + "\r\n" if self._columns else ""
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_file(self.path, header.encode() + _text(self._columns, rows))


def _columns(path: Path) -> list[str]:
    try:
        with open(path, newline="") as file:
            return next(csv.reader(file), [])
    except FileNotFoundError:
        return []


def _read(path: Path) -> list[dict[str, str]]:
    """Return the complete rows of a file without their empty fields; empty if there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1].decode()
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    found = [{column: value for column, value in row.items() if value} for row in rows]
    return [row for row in found if row.get("step", "").isdigit()]


def _text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


def _append(path: Path, content: bytes) -> None:
    """Append the whole content or, when the disk is full, none of it."""
    end = os.path.getsize(path)
    try:
        with open(path, "ab", buffering=0) as file:
            while content:
                content = content[file.write(content) :]
    except OSError as error:
        os.truncate(path, end)
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
