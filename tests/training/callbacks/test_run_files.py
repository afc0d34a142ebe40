"""Test the helpers that the callbacks share: the folder of a run, CSV, and the first samples of a batch."""

import csv
import io
import os
from pathlib import Path
from types import SimpleNamespace

import torch

from visionattn.training.callbacks import run_files


def test_csv_rows_with_any_text_are_read_back_by_python():
    rows = [["name", "value"], ['a, "quoted"\nname', "1"], [os.fsdecode(b"caf\xe9.jpg"), "0.5"], ["ü", ""]]
    text = run_files._csv(rows).decode("utf-8", "surrogateescape")
    assert list(csv.reader(io.StringIO(text, newline=""))) == rows


def test_fast_dev_run_and_trainer_without_a_folder_have_no_overlays_folder():
    normal = SimpleNamespace(fast_dev_run=False, log_dir="runs/mine/0")
    assert run_files._folder(normal) == Path("runs/mine/0/overlays")
    assert run_files._folder(SimpleNamespace(fast_dev_run=1, log_dir="runs/mine/0")) is None
    assert run_files._folder(SimpleNamespace(fast_dev_run=False, log_dir=None)) is None


def test_first_samples_of_a_batch_are_cut_from_tensors_and_lists():
    batch = {"image": torch.arange(5), "path": list("abcde")}
    first = run_files._first(batch, 2)
    assert first["image"].tolist() == [0, 1]
    assert first["path"] == ["a", "b"]
