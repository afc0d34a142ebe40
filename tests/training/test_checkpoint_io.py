"""Test that saving writes a complete checkpoint, and that a failed save keeps the earlier checkpoint."""

import pickle

import pytest
import torch

from visionattn.training.checkpoint_io import DurableCheckpointIO


def test_saved_checkpoint_can_be_read_and_is_the_only_file(tmp_path):
    path = tmp_path / "new" / "last.ckpt"
    content = {"state_dict": {"weight": torch.arange(6.0)}, "epoch": 3}
    DurableCheckpointIO().save_checkpoint(content, path)
    read = torch.load(path, weights_only=True)
    assert read["epoch"] == 3
    assert torch.equal(read["state_dict"]["weight"], torch.arange(6.0))
    assert list(path.parent.iterdir()) == [path]


def test_failed_save_keeps_the_earlier_checkpoint(tmp_path):
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint({"epoch": 1}, path)
    before = path.read_bytes()
    with pytest.raises((pickle.PicklingError, AttributeError)):
        DurableCheckpointIO().save_checkpoint({"epoch": 2, "cannot be pickled": lambda: None}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
