"""Test the random numbers of each step. `tests/faults/test_resume.py` tests the resume of whole trainings."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.conftest import CONFIGS
from visionattn.cli import main
from visionattn.training.resume import Resume


def random_numbers(resume, *, epoch=1, batch=2, rank=0, loader=0):
    """Return the first numbers of the three random generators in a validation batch."""
    trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
    resume.on_validation_batch_start(trainer, None, None, batch, loader)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_numbers_depend_only_on_seed_epoch_batch_process_and_loader():
    resume = Resume()
    resume.seed = 3
    first = random_numbers(resume)
    random_numbers(resume, batch=5)
    assert random_numbers(resume) == first
    changes = [{"epoch": 2}, {"batch": 3}, {"rank": 1}, {"loader": 1}]
    others = [random_numbers(resume, **change) for change in changes]
    resume.seed = 4
    others.append(random_numbers(resume))
    for numbers_of_a_generator in zip(first, *others, strict=True):
        assert len(set(numbers_of_a_generator)) == 6


def test_without_a_seed_the_generators_are_not_seeded():
    torch.manual_seed(7)
    expected = float(torch.rand(()))
    torch.manual_seed(7)
    assert random_numbers(Resume())[2] == expected


@pytest.mark.parametrize("option", [{"every_n_steps": 0}, {"every_n_minutes": 0.0}])
def test_intervals_of_zero_are_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Resume(**option)


def test_a_training_that_max_steps_ended_within_an_epoch_continues_with_its_next_batch(
    photo_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    flags = [
        "fit", f"--config={CONFIGS / 'folder.yaml'}", f"--data.root={photo_folder}", "--data.num_workers=0",
        "--data.batch_size=4", "--data.preprocess=visionattn.data.Preprocess", "--data.preprocess.size=32",
        "--overlays.every_n_epochs=0", "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu",
        "--model.network.widths=[4,4]", "--model.lr_scheduler=null",
    ]  # fmt: skip
    assert main([*flags, "--name=whole", "--trainer.max_epochs=2"]) == 0
    assert main([*flags, "--name=stopped", "--trainer.max_epochs=2", "--trainer.max_steps=5"]) == 0
    assert torch.load("runs/stopped/0/last.ckpt", weights_only=True)["global_step"] == 5
    assert main([*flags, "--name=stopped", "--trainer.max_epochs=2", "--ckpt_path=last"]) == 0
    whole, resumed = (torch.load(f"runs/{name}/0/last.ckpt", weights_only=True) for name in ("whole", "stopped"))
    assert whole["global_step"] == resumed["global_step"]
    assert all(torch.equal(whole["state_dict"][name], resumed["state_dict"][name]) for name in whole["state_dict"])
