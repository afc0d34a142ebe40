"""Test metrics.csv: several processes, one after the other, write their rows into the same file."""

import csv

from visionattn.training.callbacks.metrics_file import MetricsFile


def rows(folder):
    """Return the rows of metrics.csv without empty fields."""
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_later_processes_add_rows_and_columns(tmp_path):
    for name in ("train/loss", "test/loss", "train/loss"):  # a new logger each time, as in a new process
        log = MetricsFile(tmp_path)
        log.log_metrics({name: 0.5}, step=3)
        log.finalize("success")
    assert rows(tmp_path) == [
        {"step": "3", "train/loss": "0.5"},
        {"step": "3", "test/loss": "0.5"},
        {"step": "3", "train/loss": "0.5"},
    ]


def test_resumed_training_logs_each_step_once(tmp_path):
    first = MetricsFile(tmp_path)
    for step in range(6):
        first.log_metrics({"loss": step}, step=step)
        if step == 3:
            saved = first.count  # the checkpoint is written before the validation that follows step 3
        if step % 2:
            first.log_metrics({"val": step}, step=step)
    first.save()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("7,0.")  # the process was killed while it wrote a row
    resumed = MetricsFile(tmp_path)
    kept = resumed.continue_after(saved)
    assert kept == rows(tmp_path)
    assert len(kept) == saved == resumed.count == 5
    resumed.log_metrics({"val": 3}, step=3)
    for step in range(4, 8):
        resumed.log_metrics({"loss": step}, step=step)
    resumed.save()
    assert resumed.count == len(rows(tmp_path)) == 10
    assert [int(row["step"]) for row in rows(tmp_path) if "loss" in row] == list(range(8))
    assert [int(row["step"]) for row in rows(tmp_path) if "val" in row] == [1, 3]
