"""Checkpoints are whole: as torch reads them, or the earlier one."""

import pickle

import pytest
import torch

from visionattn.training.checkpoint_io import DurableCheckpointIO


def test_torch_reads_what_was_saved_and_nothing_lies_beside_it(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    content = {"state_dict": {"weight": torch.arange(6.0)}, "epoch": 3}
    DurableCheckpointIO().save_checkpoint(content, path)
    read = torch.load(path, weights_only=True)
    assert read["epoch"] == 3
    assert torch.equal(read["state_dict"]["weight"], torch.arange(6.0))
    assert list(path.parent.iterdir()) == [path]


def test_what_cannot_be_saved_leaves_the_earlier_one(tmp_path):
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        DurableCheckpointIO().save_checkpoint({"epoch": 2, "cannot be pickled": lambda: None}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
