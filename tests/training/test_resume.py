"""Random numbers of a step, and when checkpoints are written. Whole trainings: `tests/faults/test_resume.py`."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from visionattn.training.resume import Resume


def drawn(resume, *, epoch=1, batch=2, rank=0, loader=0):
    """What all three generators give after a batch has begun."""
    trainer = SimpleNamespace(current_epoch=epoch, global_rank=rank)
    resume.on_validation_batch_start(trainer, None, None, batch, loader)
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_random_numbers_depend_only_on_seed_epoch_batch_process_and_loader():
    resume = Resume()
    resume.seed = 3
    first = drawn(resume)
    drawn(resume, batch=5)
    assert drawn(resume) == first
    others = [drawn(resume, epoch=2), drawn(resume, batch=3), drawn(resume, rank=1), drawn(resume, loader=1)]
    resume.seed = 4
    others.append(drawn(resume))
    for generator in zip(first, *others, strict=True):
        assert len(set(generator)) == 6


def test_without_a_seed_the_generators_are_left_alone():
    torch.manual_seed(7)
    expected = float(torch.rand(()))
    torch.manual_seed(7)
    assert drawn(Resume())[2] == expected


@pytest.mark.parametrize("option", [{"every_n_steps": 0}, {"every_n_minutes": 0.0}])
def test_intervals_of_zero_are_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"^{name} must be"):
        Resume(**option)
