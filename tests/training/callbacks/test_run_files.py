"""Test the helpers that the callbacks share: the folder of a run, CSV, and the first samples of a batch."""

import csv
import io
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from visionattn.training.callbacks import run_files


def test_python_reads_csv_rows_with_any_text():
    rows = [["name", "value"], ['a, "quoted"\nname', "1"], [os.fsdecode(b"caf\xe9.jpg"), "0.5"], ["ü", ""]]
    text = run_files._csv(rows).decode("utf-8", "surrogateescape")
    assert list(csv.reader(io.StringIO(text, newline=""))) == rows


def test_fast_dev_run_and_a_trainer_without_a_folder_write_no_files():
    kept = SimpleNamespace(fast_dev_run=False, log_dir="runs/mine/0")
    assert run_files._folder(kept) == Path("runs/mine/0/overlays")
    assert run_files._folder(SimpleNamespace(fast_dev_run=1, log_dir="runs/mine/0")) is None
    assert run_files._folder(SimpleNamespace(fast_dev_run=False, log_dir=None)) is None


def test_the_first_samples_of_a_batch_keep_their_lists_and_tensors():
    batch = {"image": torch.arange(5), "path": list("abcde")}
    first = run_files._first(batch, 2)
    assert first["image"].tolist() == [0, 1]
    assert first["path"] == ["a", "b"]
