"""metrics.csv: rows of several processes in one file."""

import csv

from visionattn.training.callbacks.metrics_file import MetricsFile


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: value for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_another_process_adds_its_rows_and_columns(tmp_path):
    for name in ("train/loss", "test/loss", "train/loss"):
        log = MetricsFile(tmp_path)
        log.log_metrics({name: 0.5}, step=3)
        log.finalize("success")
    assert rows(tmp_path) == [
        {"step": "3", "train/loss": "0.5"},
        {"step": "3", "test/loss": "0.5"},
        {"step": "3", "train/loss": "0.5"},
    ]


def test_a_continued_training_logs_each_step_once(tmp_path):
    first = MetricsFile(tmp_path)
    for step in range(6):
        first.log_metrics({"loss": step}, step=step)
        if step % 2:
            first.log_metrics({"val": step}, step=step)
    first.save()
    with open(tmp_path / "metrics.csv", "a") as file:
        file.write("7,0.")  # half a row, of a process that was killed
    again = MetricsFile(tmp_path)
    again.continue_at(4)  # before the validation that follows step 3
    again.log_metrics({"val": 3}, step=3)
    for step in range(4, 8):
        again.log_metrics({"loss": step}, step=step)
    again.save()
    found = rows(tmp_path)
    assert [int(row["step"]) for row in found if "loss" in row] == list(range(8))
    assert [int(row["step"]) for row in found if "val" in row] == [1, 3]
