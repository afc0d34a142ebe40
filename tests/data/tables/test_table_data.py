"""Test the data modules of tables: splits, labels, weighted sampling, and a resume with a changed table."""

import re
from collections import Counter

import numpy as np
import pytest
import torch

from tests.data.tables.labelled import SHAPES, write_csv, write_images
from tests.refusals import refuses
from visionattn.data import ImageFolderData, MultiLabelTableData, Preprocess, TableData
from visionattn.errors import DataError

SMALL = {"preprocess": Preprocess(32), "num_workers": 0, "batch_size": 4}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    return tmp_path / "images"


def names(data, split):
    return [row.path.name for row in data._rows[split]]


def test_batches_hold_the_number_of_the_label_and_the_picture_at_the_path(folder, tmp_path):
    labels = write_images(folder, 24, single=True)
    rows = [
        [name, chosen[0], "train" if number < 12 else "val"] for number, (name, chosen) in enumerate(labels.items())
    ]
    table = write_csv(tmp_path / "a.csv", rows, ("path", "label", "split"))
    data = TableData(table, root=str(folder), **SMALL)
    assert data.class_names == tuple(SHAPES)
    assert (names(data, "train"), names(data, "val")) == (list(labels)[:12], list(labels)[12:])
    assert data.class_counts.tolist() == [4, 4, 4]
    data.setup("fit")
    for batch in data.train_dataloader():
        assert batch["label"].dtype == torch.int64
        for path, label in zip(batch["path"], batch["label"], strict=True):
            assert [list(SHAPES)[label]] == labels[path.rsplit("/", 1)[-1]]
    refuses(DataError, "has no test split", data.setup, "test")


@pytest.mark.parametrize("form", ["names", "columns"])
def test_batches_of_several_labels_are_rows_of_0_and_1(form, folder, tmp_path):
    labels = write_images(folder, 24)
    if form == "names":
        rows, header = [[name, ";".join(chosen)] for name, chosen in labels.items()], ("path", "labels")
        options = {"separator": ";"}
    else:
        rows = [[name, *(int(shape in chosen) for shape in SHAPES)] for name, chosen in labels.items()]
        header, options = ("path", *SHAPES), {"labels": list(SHAPES)}
    table = write_csv(folder / "a.csv", rows, header)
    data = MultiLabelTableData(table, val_fraction=0.3, **options, **SMALL)
    data.setup("fit")
    seen = {}
    for batch in (*data.train_dataloader(), *data.val_dataloader()):
        assert batch["label"].dtype == torch.float32
        for path, label_K in zip(batch["path"], batch["label"], strict=True):
            seen[path.rsplit("/", 1)[-1]] = [name for name, one in zip(SHAPES, label_K, strict=True) if one]
    assert len(seen) >= 20  # images that do not fill the last training batch are left out
    assert seen == {name: labels[name] for name in seen}
    counted = Counter(label for name in names(data, "train") for label in labels[name])
    assert data.class_counts.tolist() == [counted[name] for name in SHAPES]
    assert data.train_count == len(names(data, "train"))


def test_splits_are_drawn_as_in_folders_and_do_not_depend_on_other_rows(photo_folder, tmp_path):
    rows = [[f"class{label}/{number}.png", f"class{label}"] for label in range(5) for number in range(12)]
    table = write_csv(tmp_path / "a.csv", rows)
    options = {"val_fraction": 0.25, "test_fraction": 0.25, **SMALL}
    data = TableData(table, root=str(photo_folder), **options)
    for split in ("train", "val", "test"):
        assert Counter(row.labels for row in data._rows[split]).keys() == {(f"class{label}",) for label in range(5)}
    assert sum(len(part) for part in data._rows.values()) == 60
    fewer = TableData(write_csv(tmp_path / "b.csv", rows[::-1][:-5]), root=str(photo_folder), **options)
    for split in ("train", "val", "test"):
        left = {row.path for row in data._rows[split]} - {photo_folder / path for path, _ in rows[:5]}
        assert left <= {row.path for row in fewer._rows[split]}
    with_test = [[*row, "test" if number % 4 == 0 else "train"] for number, row in enumerate(rows)]
    third = TableData(
        write_csv(tmp_path / "c.csv", with_test, ("path", "label", "split")), root=str(photo_folder), **options
    )
    assert len(third._rows["test"]) == 15
    assert sum(len(part) for part in third._rows.values()) == 60


@pytest.mark.parametrize("balance", [0, 1])
def test_balance_1_uses_every_class_equally_often(balance, folder):
    write_images(folder, 60, single=True)
    rows = [[f"{number:03d}.png", "rare" if number < 8 else "some" if number < 20 else "many"] for number in range(60)]
    data = TableData(write_csv(folder / "a.csv", rows), balance=balance, val_fraction=0.25, **SMALL)
    data.setup("fit")
    order = list(data.train_dataloader().sampler)
    labels = Counter(data._rows["train"][index].labels[0] for index, _ in order)
    assert len(order) == data.train_count // 4 * 4
    assert len(set(order)) == len(order)  # repeats of an image are augmented differently
    if balance:
        third = data.train_count / 3
        assert all(third - 5 <= count <= third + 1 for count in labels.values())  # 3 images may fill no batch
    else:
        assert len({index for index, _ in order}) == len(order)
        assert labels["many"] > 2 * labels["some"] > 2 * labels["rare"]
    refuses(ValueError, "balance must be in", TableData, str(folder / "a.csv"), balance=2, **SMALL)


def test_weights_of_several_labels_follow_the_rarest_label(folder, tmp_path):
    labels = write_images(folder, 40)
    table = write_csv(
        folder / "a.csv", [[name, "|".join(chosen)] for name, chosen in labels.items()], ("path", "labels")
    )
    data = MultiLabelTableData(table, balance=0.5, **SMALL)
    counts = dict(zip(SHAPES, data.class_counts, strict=True))
    bare = sum(not row.labels for row in data._rows["train"])
    expected = [min([counts[label] for label in row.labels] or [bare]) ** -0.5 for row in data._rows["train"]]
    np.testing.assert_allclose(data.sampling_weights(), expected)


def test_folders_can_be_balanced_too(photo_folder):
    data = ImageFolderData(str(photo_folder), balance=1, val_fraction=0.25, **SMALL)
    data.setup("fit")
    uniform = ImageFolderData(str(photo_folder), val_fraction=0.25, **SMALL)
    assert uniform.sampling_weights() is None
    labels = [data._files["train"][index][1] for index, _ in data.train_dataloader().sampler]
    assert set(Counter(labels).values()) <= {len(labels) // 5, len(labels) // 5 + 1}


def test_tables_without_usable_training_images_are_refused(folder, tmp_path):
    labels = write_images(folder, 12, single=True)

    def refused(rows, header, message, cls=TableData, **options):
        table = write_csv(folder / "a.csv", rows, header)
        refuses(DataError, re.escape(message.replace("TABLE", table)), cls, table, **options, **SMALL)

    split = ("path", "label", "split")
    refused([["000.png", "cat", "val"]], split, "TABLE has no training images: no row has the split train")
    some = [["000.png", "cat", "train"], ["001.png", "cat", ""]]
    refused(some, split, "TABLE, line 3: there is no split, but other rows have one; fill the column in every row")
    val = [["000.png", "cat", "train"], ["001.png", "dog", "val"]]
    refused(val, split, "TABLE has no training image of the class 'dog'; add images, or remove the class")
    refused([["000.png", "cat"]], ("path", "label"), "the class 'cat' in TABLE has 1 images, too few to split")
    rows = [[name, ""] for name in labels]
    refused(
        rows, ("path", "labels"), "TABLE has no labels at all; check that the labels are in the", MultiLabelTableData
    )
    refused(
        [["gone.png", "cat"]], ("path", "label"), f"TABLE, line 2: there is no image {folder}/gone.png; correct the"
    )
    twice = [["000.png", "cat"], ["000.png", "dog"]]
    refused(twice, ("path", "label"), f"TABLE, line 3: {folder}/000.png has dog, and in line 2 cat; correct the table")
    rows = [[name, "cat"] for name in labels]
    refused(
        [*rows, ["000.png", "cow"]],
        ("path", "label"),
        "there is no class 'cow'. Nearest: ",
        class_names=["cat", "crow"],
    )
    with pytest.warns(UserWarning, match="1 rows repeat an earlier row, and are left out"):
        assert TableData(write_csv(folder / "a.csv", [*rows, rows[0]]), **SMALL).class_counts.sum() < 12
