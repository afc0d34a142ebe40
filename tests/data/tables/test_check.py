"""Test the check of a table of image paths and labels."""

import shutil
from pathlib import Path

import pytest

from tests.commands.command_line import fails
from tests.data.tables.labelled import write_csv, write_images
from visionattn.cli import main


@pytest.fixture
def home(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("labels", ["labels", "label"])
def test_data_check_reads_a_table_without_problems(labels, home, capsys):
    chosen = write_images(home / "images", 9, single=labels == "label")
    write_csv(home / "labels.csv", [[name, "|".join(own)] for name, own in chosen.items()], ("path", labels))
    assert main(["data", "check", "labels.csv", "--images=images"]) == 0
    printed = capsys.readouterr().out
    assert "table, 3 classes: bar, disc, square" in printed
    bare = sum(not own for own in chosen.values())
    assert (f", {bare} without a label" in printed) == bool(bare)
    assert "no problems" in printed


@pytest.mark.parametrize("flags", [["--path-column=file"], ["--split-column=part"], ["--label-column=labels"]])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_several_labels_are_found_whichever_columns_are_named(flags, suffix, home, capsys):
    write_images(home / "images", 3)
    columns = {"file" if "file" in flags[0] else "path": ["000.png", "001.png", "002.png"],
               "labels": ["cat|dog", "dog", "cat"]}  # fmt: skip
    if suffix == "csv":
        write_csv("own.csv", list(zip(*columns.values(), strict=True)), list(columns))
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pytest.importorskip("pyarrow").table(columns), "own.parquet")
    assert main(["data", "check", f"own.{suffix}", "--images=images", *flags]) == 0, capsys.readouterr()
    assert "all    3 images: cat 2, dog 2" in capsys.readouterr().out


def test_problems_of_the_whole_table_are_named(home, capsys):
    (home / "empty.csv").write_text("path,labels\n")
    fails(["data", "check", "empty.csv"], 1, "names no images: it has a header and no rows", capsys=capsys)
    (home / "short.csv").write_text("path,labels\na.png\n")
    fails(["data", "check", "short.csv"], 1, "line 2: there are 1 cells and 2 columns", capsys=capsys)


def test_data_check_lists_every_problem_of_a_table(home, capsys):
    write_images(home / "images", 9)
    shutil.copy("images/000.png", "images/copy.png")
    Path("images/002.png").write_bytes(Path("images/002.png").read_bytes()[:500])
    rows = [
        ["000.png", "cat", "train"], ["001.png", "dog", "train"], ["gone.png", "dog", "val"], ["001.png", "cat", "val"],
        ["copy.png", "cat", "val"], ["002.png", "dog", "val"],
    ]  # fmt: skip
    write_csv("own.csv", rows, ("file", "kind", "part"))
    flags = ["--images=images", "--path-column=file", "--label-column=kind", "--split-column=part"]
    assert main(["data", "check", "own.csv", *flags]) == 1
    printed = capsys.readouterr().out
    for line in (
        "table, 2 classes: cat, dog",
        "train  2 images: cat 1, dog 1",
        "val    1 images: cat 1, dog 0",
        "line 4: there is no image images/gone.png",
        "line 5: images/001.png has cat, and in line 3 dog",
        "line 7: images/002.png: cut short",
        "images/copy.png: in val, and as 000.png in train",
        "dog: in val",
    ):
        assert line in printed
    fails(["data", "check", "own.csv"], 1, "has no column 'path'", capsys=capsys)
    fails(["data", "check", "own.csv", "--box-format=xyxy"], 2, "--box-format is for folders with boxes", capsys=capsys)
    fails(
        ["data", "check", "images", "--separator=,"], 2, "--separator is for tables, and images is none", capsys=capsys
    )
