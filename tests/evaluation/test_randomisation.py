"""Shuffled models keep the values of each weight, and the rank correlation equals SciPy's."""

import pytest
import torch
from scipy.stats import spearmanr

from tests.capture import models
from tests.capture.models import assert_same_state, state_of
from visionattn.evaluation.randomisation import rank_correlation, shuffled


@pytest.mark.parametrize("build", [models.vit, models.swin, models.resnet, models.torchvision_vit])
def test_every_weight_is_shuffled_and_keeps_its_values(build):
    model = build()
    before = state_of(model)
    random = shuffled(model, seed=3)
    assert_same_state(before, state_of(model))
    learned = dict(model.named_parameters())
    learned |= {name: value for name, value in model.named_buffers() if name.endswith(("running_mean", "running_var"))}
    after = dict(random.named_parameters()) | dict(random.named_buffers())
    for name, value in learned.items():
        assert torch.equal(value.flatten().sort().values, after[name].flatten().sort().values), name
        if value.unique().numel() > 20:  # with fewer distinct values, many positions keep their value by chance
            moved = float((value != after[name]).float().mean())
            assert moved > 0.8, name
    for name, value in model.named_buffers():
        if name not in learned:  # indices and masks are not learned
            assert torch.equal(value, after[name]), name
    assert all(
        torch.equal(a, b) for a, b in zip(random.parameters(), shuffled(model, seed=3).parameters(), strict=True)
    )
    different = zip(random.parameters(), shuffled(model, seed=4).parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in different)


def test_tied_weights_stay_tied_and_frozen_weights_are_shuffled():
    layer = torch.nn.Linear(8, 8)
    model = torch.nn.Sequential(layer, layer).requires_grad_(False)
    random = shuffled(model)
    assert random[0] is random[1]
    assert not torch.equal(random[0].weight, layer.weight)


@pytest.mark.parametrize("values", [3, 1000])
def test_rank_correlation_equals_scipys(values):
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, values, (30, 5, 7), generator=generator).float()
    b = (
        a
        + torch.randint(-values, values, (30, 5, 7), generator=generator).float()
        * torch.linspace(0, 2, 30)[:, None, None]
    )
    expected = [spearmanr(x.flatten(), y.flatten()).statistic for x, y in zip(a, b, strict=True)]
    torch.testing.assert_close(rank_correlation(a, b), torch.tensor(expected, dtype=torch.float32))


def test_constant_maps_correlate_only_with_constant_maps():
    constant, varying = torch.ones(1, 3, 3), torch.rand(1, 3, 3)
    assert rank_correlation(constant, varying).item() == rank_correlation(varying, constant).item() == 0
    assert rank_correlation(constant, constant * 2).item() == 1
    assert rank_correlation(varying, -varying).item() == pytest.approx(-1)
