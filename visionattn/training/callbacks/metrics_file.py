"""Write `metrics.csv` of a run: a row for each logged step, complete even if the run is killed and resumed."""

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
_ROWS = 100  # maximum number of rows kept in memory before they are written


class MetricsFile(Logger):
    """A Lightning logger that writes `metrics.csv`.

    This logger appends to the rows of an earlier process, and the file is complete at any moment. In contrast,
    Lightning's CSVLogger deletes an earlier file of the same run, and rewrites the file in place for each new column.

    Args:
        folder: of the run.

    Attributes:
        count: number of rows that this run has logged so far, including those of earlier processes.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.path = folder / NAME
        self._columns: list[str] = []
        self._waiting: list[dict[str, object]] = []
        self.count = 0

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
        """Do nothing, because config.yaml has the hyper-parameters."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Add a row. Rows are written in hundreds, before each checkpoint, and at the end."""
        self._waiting.append({"step": step, **metrics})
        self.count += 1
        if len(self._waiting) >= _ROWS:
            self.save()

    def continue_after(self, count: int) -> list[dict[str, str]]:
        """Keep the first `count` rows of the file and return them; drop later rows, which the resumed run logs again.

        Only the first process of a run changes the file.
        """
        rows = _read(self.path)[:count]
        self.count = len(rows)
        self._columns = sorted({column for row in rows for column in row})
        self._replace(rows)
        return rows

    @rank_zero_only
    def save(self) -> None:
        """Write the rows that are kept in memory.

        Raises:
            DataError: the file cannot be written; its earlier rows are unchanged.
        """
        rows, self._waiting = self._waiting, []
        self._columns = self._columns or _columns(self.path)  # the file may be from an earlier training or test
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

    @rank_zero_only
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
    """Return the complete rows of a file, without empty fields; an empty list if there is no file."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = content[: content.rfind(b"\n") + 1].decode()
    rows = csv.DictReader(io.StringIO(whole, newline=""))
    return [{column: value for column, value in row.items() if value} for row in rows]


def _text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns).writerows(rows)
    return text.getvalue().encode()


def _append(path: Path, content: bytes) -> None:
    """Append the content; if writing fails, e.g. on a full disk, restore the file's old length."""
    end = os.path.getsize(path)
    try:
        with open(path, "ab", buffering=0) as file:
            while content:
                content = content[file.write(content) :]
    except OSError as error:
        os.truncate(path, end)
        raise DataError(f"{path} cannot be written: {error.strerror}") from error
