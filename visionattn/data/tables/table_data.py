"""Data modules for tables of image paths and labels: one label for each image, or any number of labels."""

import warnings
from abc import ABC
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset

from visionattn.data.classes import class_names_in, warn_of_similar
from visionattn.data.datamodules import ClassificationData, balanced_weights, check_balance
from visionattn.data.image_folder import ImageFolder
from visionattn.data.listing import Listing, item_of, name_below
from visionattn.data.loading.batches import Split
from visionattn.data.loading.workers import WORKER_TIMEOUT, Unreadable
from visionattn.data.placement import Preprocess
from visionattn.data.samples import Sample, Transform
from visionattn.data.splits import check_fractions, draw_splits
from visionattn.data.tables.reading import Columns, Row, Table, read_table
from visionattn.errors import DataError


class _TableData(ClassificationData, ABC):
    """The images of a table; `TableData` describes the arguments.

    Args:
        table: as read.
        root: folder to which the paths are relative; None for the table's folder.
        groups: name → rows of which about the same fractions are drawn for each split that the table does not give.
        preprocess, augment, balance, val_fraction, test_fraction: see `TableData`.
        loading: arguments of `ImageData`.
    """

    _kind = "class"  # the word for a label in messages

    def __init__(
        self,
        table: Table,
        root: str | None,
        groups: Mapping[str, Sequence[Row]],
        *,
        preprocess: Preprocess | None,
        augment: Transform | None,
        balance: float,
        val_fraction: float,
        test_fraction: float,
        **loading: Any,  # the arguments of ImageData
    ) -> None:
        check_fractions(val_fraction, test_fraction)
        check_balance(balance)
        super().__init__(preprocess=preprocess or Preprocess(), **loading)
        self.root = Path(table.file).parent if root is None else Path(root)
        self.augment = augment
        self.balance = balance
        self.class_names = table.class_names
        self._rows = _divided(table, self.root, groups, val_fraction, test_fraction, self.seed)
        self._numbers = {name: number for number, name in enumerate(self.class_names)}
        warn_of_similar(self.class_names, table.file)
        if twice := sum(problem.kind == "listed twice" for problem in table.problems):
            warnings.warn(f"{table.file}: {twice} rows repeat an earlier row, and are left out", stacklevel=1)
        for name, count in zip(self.class_names, self.class_counts, strict=True):
            if not count:
                raise DataError(
                    f"{table.file} has no training image of the {self._kind} {name!r}; add images, or remove the "
                    f"{self._kind}"
                )

    @property
    def class_counts(self) -> NDArray[np.int64]:
        numbers = [self._numbers[label] for row in self._rows["train"] for label in row.labels]
        return np.bincount(np.array(numbers, np.int64), minlength=len(self.class_names))

    @property
    def train_count(self) -> int:
        return len(self._rows["train"])

    def sampling_weights(self) -> NDArray[np.float64] | None:
        labels = [[self._numbers[label] for label in row.labels] for row in self._rows["train"]]
        return balanced_weights(labels, self.class_counts, self.balance)

    def listing(self, split: Split) -> Listing | None:
        return {
            name_below(row.path, [self.root]): item_of(
                row.path, *(label.encode("utf-8", "surrogateescape") for label in sorted(row.labels))
            )
            for row in self._rows.get(split, ())
        }

    def dataset(self, split: Split) -> Dataset[Sample] | None:
        if split not in self._rows:
            return None
        augment = self.augment if split == "train" else None
        files = [(row.path, self._label(row)) for row in self._rows[split]]
        return ImageFolder(files, preprocess=self.preprocess, augment=augment)

    def _label(self, row: Row) -> int | NDArray[np.float32]:
        return self._numbers[row.labels[0]]


class TableData(_TableData):
    """Images in a CSV, TSV or Parquet file with a column of paths and a column of labels, one label for each image.

    If the table has a column `split`, its values are train, val and test (or valid, validation, training, testing). If
    the table gives no validation images, about the same fraction of every class is drawn from the training images.
    `seed` and a hash of the image's path in `root` determine the choice, so an image keeps its split when other rows
    are added or removed (see `splits.draw_splits`).

    Args:
        table: path of the .csv, .tsv or .parquet file. Parquet needs the package pyarrow.
        root: folder to which the paths in the table are relative (default: the table's folder).
        path_column, label_column: names of the columns.
        split_column: name of the column of splits, which the table may lack.
        class_names: the valid labels in the order of their numbers: a list, or the path of a text file with one name
            per line (default: all labels of the table, in natural order).
        preprocess: converts an image to the model's input (default: as for `ImageFolderData`).
        augment: random change of training images, e.g. `visionattn.data.transforms.Augmentation` (default: no change).
        balance: how strongly images of rare classes are favoured, see `balanced_weights`; 0 uses every image once an
            epoch, 1 every class equally often (default: 0).
        val_fraction: approximate fraction of validation images, in (0, 1); used if the table gives none.
        test_fraction: approximate fraction of test images; used if the table gives no splits. 0 gives no test split.
        batch_size, num_workers, seed, unreadable, worker_timeout, changed_ok: see `ImageData`.

    Raises:
        DataError: the table cannot be read, is empty or lacks a column; a row has no path, an image that does not
            exist, an unknown label or split; an image is listed twice with different labels or splits; or a class has
            no training image.
        ValueError: balance, val_fraction or test_fraction is out of its range.
    """

    def __init__(
        self,
        table: str,
        *,
        root: str | None = None,
        path_column: str = "path",
        label_column: str = "label",
        split_column: str = "split",
        class_names: list[str] | str | None = None,
        preprocess: Preprocess | None = None,
        augment: Transform | None = None,
        balance: float = 0.0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 2,
        seed: int = 0,
        unreadable: Unreadable = "stop",
        worker_timeout: float = WORKER_TIMEOUT,
        changed_ok: bool = False,
    ) -> None:
        columns = Columns(path_column, label_column, split_column)
        read = _read(table, columns, root, class_names)
        groups: dict[str, list[Row]] = {name: [] for name in read.class_names}
        for row in read.rows:
            groups[row.labels[0]].append(row)
        super().__init__(
            read,
            root,
            {f"the class {name!r} in {table}": rows for name, rows in groups.items() if rows},
            preprocess=preprocess,
            augment=augment,
            balance=balance,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            worker_timeout=worker_timeout,
            changed_ok=changed_ok,
        )


class MultiLabelTableData(_TableData):
    """Images in a CSV, TSV or Parquet file with any number of labels for each image.

    In a batch, `label` is (B, K) float32: 1 for the labels of an image and 0 for the other classes. The splits are
    drawn as in `TableData`, but from all images together.

    Args:
        table, root, path_column, split_column, preprocess, augment, val_fraction, test_fraction: see `TableData`.
        labels: column of an image's labels, with `separator` between them (in Parquet also a list of names); or a list
            of columns, one for each class, with 1 where the image has the label and 0 where not (default: labels).
        separator: text between two labels of an image (default: |).
        class_names: the valid labels, see `TableData` (default: all labels of the table in natural order, or the
            columns in `labels`).
        balance: how strongly images with rare labels are favoured, see `balanced_weights` (default: 0).
        batch_size, num_workers, seed, unreadable, worker_timeout, changed_ok: see `ImageData`.

    Raises:
        DataError, ValueError: see `TableData`; images without a label are allowed.
    """

    multi_label = True
    _kind = "label"

    def __init__(
        self,
        table: str,
        *,
        root: str | None = None,
        path_column: str = "path",
        labels: str | list[str] = "labels",
        separator: str = "|",
        split_column: str = "split",
        class_names: list[str] | str | None = None,
        preprocess: Preprocess | None = None,
        augment: Transform | None = None,
        balance: float = 0.0,
        val_fraction: float = 0.15,
        test_fraction: float = 0.0,
        batch_size: int = 32,
        num_workers: int = 2,
        seed: int = 0,
        unreadable: Unreadable = "stop",
        worker_timeout: float = WORKER_TIMEOUT,
        changed_ok: bool = False,
    ) -> None:
        if not separator:
            raise ValueError("separator must not be empty; for images with one label each, use TableData")
        read = _read(table, Columns(path_column, labels, split_column, separator), root, class_names)
        if not read.class_names:
            raise DataError(f"{table} has no labels at all; check that the labels are in the column {labels!r}")
        super().__init__(
            read,
            root,
            {table: read.rows},
            preprocess=preprocess,
            augment=augment,
            balance=balance,
            val_fraction=val_fraction,
            test_fraction=test_fraction,
            batch_size=batch_size,
            num_workers=num_workers,
            seed=seed,
            unreadable=unreadable,
            worker_timeout=worker_timeout,
            changed_ok=changed_ok,
        )

    def _label(self, row: Row) -> NDArray[np.float32]:
        label_K = np.zeros(len(self.class_names), np.float32)
        label_K[[self._numbers[label] for label in row.labels]] = 1
        return label_K


def _read(table: str, columns: Columns, root: str | None, class_names: list[str] | str | None) -> Table:
    names = None if class_names is None else class_names_in(class_names)
    read = read_table(table, columns, root=root, class_names=names)
    read.refuse()
    return read


def _divided(
    table: Table, root: Path, groups: Mapping[str, Sequence[Row]], val: float, test: float, seed: int
) -> dict[str, list[Row]]:
    """Return the splits that the table gives; draw missing ones from each group by a hash of the paths in `root`."""
    splits: dict[str, list[Row]] = {}
    for row in table.rows:
        splits.setdefault(row.split or "", []).append(row)
    if "" in splits and len(splits) > 1:
        raise DataError(
            f"{table.file}, {splits[''][0].place}: there is no split, but other rows have one; fill the column in "
            "every row, or remove it"
        )
    if "" not in splits and "train" not in splits:
        raise DataError(f"{table.file} has no training images: no row has the split train")
    if "val" in splits:
        return splits
    drawn: dict[str, list[Row]] = {}
    for where, rows in groups.items():
        pool = [row for row in rows if row.split in (None, "train")]
        if not pool:
            continue
        names = [name_below(row.path, [root]) for row in pool]
        parts = draw_splits(names, val=val, test=0.0 if "train" in splits else test, seed=seed, where=where)
        for split, part in parts.items():
            drawn.setdefault(split, []).extend(pool[index] for index in part)
    return {**splits, **drawn} if "train" in splits else drawn
