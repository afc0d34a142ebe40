"""Test the files that the quickstart's training and test write into the run."""

import csv


def test_quickstart_writes_all_files_into_its_run(quick_run):
    names = {path.relative_to(quick_run).as_posix() for path in quick_run.rglob("*") if path.is_file()}
    assert {"config.yaml", "best.ckpt", "last.ckpt", "metrics.csv", "test.csv", "confusion.csv"} <= names
    assert {"overlays/test.png", "overlays/epoch_000.jpg"} <= names
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert [path.name for path in quick_run.parents[2].iterdir()] == ["runs"]  # the current folder has no other file
    with open(quick_run / "test.csv") as file:
        metrics = {name: float(value) for name, value in list(csv.reader(file))[1:]}
    assert {"accuracy", "top5", "f1", "calibration_error", "loss"} <= metrics.keys()
    assert {"pointing", "pointing_centre_guess", "pointing_chance"} <= metrics.keys()
    with open(quick_run / "confusion.csv") as file:
        rows = list(csv.reader(file))[1:]
    assert sum(int(count) for row in rows for count in row[1:]) == 64  # the number of test images
