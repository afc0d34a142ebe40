"""Test the reading of tables: each form of labels against the labels that were written, and each wrong table."""

import csv
import re

import pytest

from tests.data.tables.labelled import SHAPES, write_csv, write_images
from tests.refusals import refuses
from visionattn.data.tables.reading import Columns, read_table
from visionattn.errors import DataError, UsageError


@pytest.fixture
def labels(tmp_path):
    """Labels of twelve pictures in images/."""
    (tmp_path / "images").mkdir()
    return write_images(tmp_path / "images", 12)


def read(path, columns=Columns(), **options):  # noqa: B008  # Columns is frozen
    table = read_table(path, columns, **options)
    return {row.path.name: list(row.labels) for row in table.rows}, table


def test_one_label_an_image_with_splits_and_odd_cells(labels, tmp_path):
    rows = [[f"images/{name}", " cat " if number % 2 else "dög", ("Train", "valid", "testing")[number % 3]]
            for number, name in enumerate(labels)]  # fmt: skip
    path = tmp_path / "a.csv"
    write_csv(path, [rows[0], [], *rows[1:]], ("path", " label ", "split"))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as Excel writes CSV
    found, table = read(path)
    assert found == {name: ["cat" if number % 2 else "dög"] for number, name in enumerate(labels)}
    assert [row.split for row in table.rows[:4]] == ["train", "val", "test", "train"]
    assert [row.place for row in table.rows[:2]] == ["line 2", "line 4"]
    assert table.class_names == ("cat", "dög")
    assert not table.problems


@pytest.mark.parametrize("form", ["csv", "tsv", "columns", "parquet", "parquet lists", "parquet columns"])
def test_every_form_of_several_labels_gives_the_labels_that_were_written(form, labels, tmp_path):
    columns = Columns(labels="labels", separator="|")
    paths = [f"images/{name}" for name in labels]
    joined = ["|".join(chosen) for chosen in labels.values()]
    marks = {shape: [int(shape in chosen) for chosen in labels.values()] for shape in SHAPES}
    if "columns" in form:
        columns = Columns(labels=list(SHAPES))
    if form.startswith("parquet"):
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        content = {"labels": list(labels.values()) if "lists" in form else joined}
        if "columns" in form:
            content = {shape: [bool(value) for value in values] for shape, values in marks.items()}
        pq.write_table(pa.table({"path": paths, **content}), path := tmp_path / "a.parquet")
    elif form == "columns":
        path = write_csv(tmp_path / "a.csv", zip(paths, *marks.values(), strict=True), ["path", *SHAPES])
    else:
        path = tmp_path / f"a.{form}"
        with open(path, "w", newline="") as file:
            writer = csv.writer(file, delimiter="\t" if form == "tsv" else ",")
            writer.writerows([["path", "labels"], *zip(paths, joined, strict=True)])
    found, table = read(path, columns)
    assert found == labels
    assert table.class_names == tuple(SHAPES)
    if form.startswith("parquet"):
        assert table.rows[3].place == "row 4"


def test_numbers_are_labels_and_are_sorted_as_numbers(labels, tmp_path):
    pq = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    numbers = [number % 11 for number in range(12)]
    for values in (numbers, [float(number) for number in numbers]):
        pq.write_table(pa.table({"path": list(labels), "label": values}), tmp_path / "a.parquet")
        found, table = read(tmp_path / "a.parquet", root=tmp_path / "images")
        assert table.class_names == tuple(map(str, range(11)))
        assert found == {name: [str(number)] for name, number in zip(labels, numbers, strict=True)}


def test_every_bad_row_is_a_problem_with_its_line(labels, tmp_path):
    a, b, c, d = list(labels)[:4]
    rows = [
        [a, "cat", "train"], ["gone.png", "cat", "train"], [b, "cow", "train"], [b, "", "train"], ["", "cat", "train"],
        [c, "dog", "holdout"], [a, "dog", "train"], [a, "cat", "val"], [a, "cat", "train"], [d, "dog", "val"],
        ["s3://bucket/e.png", "dog", "val"],
    ]  # fmt: skip
    path = write_csv(tmp_path / "a.csv", rows, ("path", "label", "split"))
    found, table = read(path, root=tmp_path / "images", class_names=["cat", "dog"])
    assert found == {a: ["cat"], d: ["dog"]}
    images = tmp_path / "images"
    assert [(problem.kind, problem.where, problem.detail) for problem in table.problems] == [
        ("missing image", "line 3", f"there is no image {images}/gone.png"),
        ("unknown class", "line 4", "there is no class 'cow'"),
        ("unreadable annotation", "line 5", f"there is no label for {b}"),
        ("unreadable annotation", "line 6", "there is no path"),
        ("unreadable annotation", "line 7", "the split is 'holdout', and must be one of train, training, val, valid, "
         "validation, test, testing"),
        ("other labels", "line 8", f"{images}/{a} has dog, and in line 2 cat"),
        ("leak", "line 9", f"{images}/{a} is in val, and in line 2 in train"),
        ("listed twice", "line 10", f"{images}/{a} is also in line 2"),
        ("unreadable annotation", "line 12", "s3://bucket/e.png is an address, and only files on this machine are read "
         "and written; copy the files, and give a local path"),
    ]  # fmt: skip
    message = (
        f"{path}, line 3: there is no image {images}/gone.png (in total: 1 unknown class, 4 unreadable annotation, "
        f"1 missing image, 1 other labels, 1 leak); correct the table; `visionattn data check {path}` lists"
    )
    refuses(DataError, re.escape(message), table.refuse)


def test_tables_that_cannot_be_read_are_refused_in_one_sentence(labels, tmp_path, monkeypatch):
    def refused(name, content, message, columns=Columns(), error=DataError):  # noqa: B008
        (tmp_path / name).write_bytes(content)
        refuses(error, message, read_table, tmp_path / name, columns)

    refused("a.csv", b"", "a.csv is empty; its first line must name the columns")
    refused("a.csv", b"path,label\n\n", "a.csv names no images: it has a header and no rows")
    refused(
        "a.csv",
        b"path,labels\n",
        "has no column 'label', but 'path', 'labels'; name the columns in .* data check. Nearest: labels",
    )
    refused("a.csv", b"file,label\nx,y\n", "a.csv has no column 'path', but 'file', 'label'")
    refused("a.csv", b"path,label,label\n", "a.csv has two columns 'label'; rename one")
    refused(
        "a.csv", b"path,label\nx.png,a,b\n", "a.csv, line 2: there are 3 cells and 2 columns; put cells that contain"
    )
    refused(
        "a.csv", b"path,cat,dog\nx.png,1\n", "a.csv, line 2: there are 2 cells and 3 columns; add the missing cells"
    )
    refused("a.txt", b"", "a.txt cannot be read as a table; its name must end in .csv, .parquet, .pq, .tsv")
    refused("a.parquet", b"PAR1 cut short", "a.parquet cannot be read as a Parquet file: ")
    refuses(DataError, "there is no table .*b.csv. Nearest: a.csv.", read_table, tmp_path / "b.csv", Columns())
    refuses(UsageError, "s3://x/a.csv is an address", read_table, "s3://x/a.csv", Columns())
    none = tmp_path / "none"
    refuses(DataError, f"there is no folder {none}, to which", read_table, tmp_path / "a.csv", Columns(), root=none)
    odd = Columns(labels=["cat", "dog"])
    path = write_csv(tmp_path / "odd.csv", [["000.png", "1", "maybe"]], ("path", "cat", "dog"))
    refuses(DataError, "line 2: the column 'dog' must have 0 or 1, got 'maybe'", read_table(path, odd).refuse)
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    refused("a.parquet", b"", r"needs pyarrow: pip install 'visionattn\[parquet\]', or write", error=UsageError)
