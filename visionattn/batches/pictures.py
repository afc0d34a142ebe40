"""Read the pictures of a batch of rows: paths, URLs, or the files' content."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visionattn.data import decode_image, read_image
from visionattn.errors import DataError, UsageError
from visionattn.files import is_address, printable

Columns: TypeAlias = Any
"""A batch: a mapping of column names to sequences, a pandas data frame, or a `pyarrow.Table`."""


@dataclass(eq=False)
class Row:
    """One row of a batch.

    Attributes:
        path: name of the image, as a terminal can show it; "" if the batch has none.
        target: index or class name of the output to explain; None means the highest output.
        picture: (H, W, 3) uint8 RGB; None if it cannot be read.
        error: why the picture cannot be read; "" if it can.
    """

    path: str
    target: int | str | None = None
    picture: NDArray[np.uint8] | None = None
    error: str = ""


def read_rows(columns: Columns, *, max_pixels: int) -> list[Row]:
    """Read the picture of every row.

    Args:
        columns: has `path` (file names or URLs), or `bytes` (the content of image files), or both; then `path` is only
            a name. Optionally `target`. Other columns are ignored.
        max_pixels: larger pictures are refused.

    Raises:
        UsageError: the batch has neither `path` nor `bytes`.
    """
    found = {name: _values(columns, name) for name in ("path", "bytes", "target") if name in _names(columns)}
    if not {"path", "bytes"} & found.keys():
        raise UsageError(f"a batch needs a column path or bytes, got {', '.join(_names(columns)) or 'no columns'}")
    count = len(next(iter(found.values())))
    empty: Sequence[object] = [None] * count
    values = zip(*(found.get(name, empty) for name in ("path", "bytes", "target")), strict=True)
    return list(_read(values, from_bytes="bytes" in found, max_pixels=max_pixels))


def _read(values: Iterator[tuple[object, object, object]], *, from_bytes: bool, max_pixels: int) -> Iterator[Row]:
    for path, content, target in values:
        name = path if isinstance(path, (str, os.PathLike)) else None
        row = Row("" if name is None else printable(name))
        try:
            row.target = _target(target)
            row.picture = _picture(name, content, from_bytes=from_bytes, max_pixels=max_pixels)
        except (DataError, UsageError) as error:
            row.error = str(error)
        yield row


def _picture(
    path: str | os.PathLike[str] | None, content: object, *, from_bytes: bool, max_pixels: int
) -> NDArray[np.uint8]:
    if from_bytes:
        if not isinstance(content, (bytes, bytearray, memoryview)):
            raise DataError(f"{printable(path or 'the image')}: there is no file content in the column `bytes`")
        return decode_image(bytes(content), printable(path or "the image"), max_pixels=max_pixels)
    if path is None:
        raise DataError("there is no file name in the column `path`; the content of files goes into `bytes`")
    name = os.fspath(path)
    if is_address(name):
        return decode_image(_fetched(name), printable(name), max_pixels=max_pixels)
    return read_image(name, max_pixels=max_pixels)


def _fetched(url: str) -> bytes:
    """Return the content of a URL.

    Raises:
        DataError: it cannot be fetched.
    """
    import fsspec

    try:
        with fsspec.open(url, "rb") as source:
            return bytes(source.read())
    except Exception as error:  # each file system of fsspec has its own exceptions
        reason = error.__cause__ or error
        raise DataError(f"{printable(url)} cannot be fetched: {reason or type(reason).__name__}") from error


def _target(value: object) -> int | str | None:
    """Return a plain target: pandas and NumPy write a missing number as NaN."""
    if value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if str(value) in ("nan", "<NA>"):
        return None
    raise DataError(f"the target {value!r} is neither the index nor the name of a class")


def _names(columns: Columns) -> list[str]:
    return list(columns.column_names if hasattr(columns, "column_names") else columns.keys())


def _values(columns: Columns, name: str) -> Sequence[object]:
    values = columns[name]
    if hasattr(values, "to_pylist"):  # a column of pyarrow
        return values.to_pylist()
    return values.tolist() if hasattr(values, "tolist") else list(values)
