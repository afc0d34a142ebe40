"""Test the normalisers against bisection, numerical gradients and cases with known results."""

import pytest
import torch

from tests.attention.soft.bisection import by_bisection
from visionattn.attention import Entmax15, NormalisedSigmoid, Softmax, Sparsemax, entmax15, sparsemax

PROJECTIONS = {sparsemax: 1, entmax15: 2}  # function: power in `by_bisection`


@pytest.mark.parametrize(("project", "power"), PROJECTIONS.items())
@pytest.mark.parametrize("scale", [0.01, 1, 10, 1000])
@pytest.mark.parametrize("length", [1, 2, 7, 50])
def test_projections_match_bisection(project, power, scale, length):
    torch.manual_seed(length)
    scores = torch.randn(3, length, dtype=torch.float64) * scale
    scores[0, length // 2] = scores[0, 0]  # a tie
    found = project(scores)
    torch.testing.assert_close(found, torch.stack([by_bisection(row, power) for row in scores]))
    torch.testing.assert_close(found.sum(-1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(project(scores.T, 0), found.T)


@pytest.mark.parametrize("project", PROJECTIONS)
def test_gradients_match_finite_differences(project):
    torch.manual_seed(0)
    scores = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    assert (project(scores) == 0).any()
    assert torch.autograd.gradcheck(project, scores)
    assert torch.autograd.gradgradcheck(project, scores)


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("offset", [100, -100, 1e4, 1e6])
def test_a_constant_added_to_the_scores_changes_nothing(project, offset):
    scores = torch.randint(-8, 9, (50, 40)) / 8  # multiples of 1/8, so that adding an offset is exact in float32
    found = project(scores + offset)
    torch.testing.assert_close(found, project(scores))
    torch.testing.assert_close(found.sum(-1), torch.ones(50))


@pytest.mark.parametrize("project", PROJECTIONS)
def test_equal_scores_get_equal_weights_and_a_much_larger_score_gets_all(project):
    torch.testing.assert_close(project(torch.zeros(5)), torch.full((5,), 0.2))
    assert project(torch.tensor([0.0, 9.0, 1.0])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("project", PROJECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_low_precision_weights_sum_to_one(project, dtype):
    weights = project((torch.randn(2, 400) * 3 + 100).to(dtype))
    assert weights.dtype == dtype
    torch.testing.assert_close(weights.float().sum(-1), torch.ones(2), atol=2e-2, rtol=0)


def test_softmax_matches_its_equation():
    scores = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    expected = (scores / 0.5).exp()
    torch.testing.assert_close(Softmax(0.5)(scores), expected / expected.sum((2, 3), keepdim=True))


def test_normalised_sigmoid_matches_its_equation_and_handles_very_low_scores():
    scores = torch.randn(2, 3, 2, 4, dtype=torch.float64)
    sigmoids = 1 / (1 + (-scores).exp())
    torch.testing.assert_close(NormalisedSigmoid()(scores), sigmoids / sigmoids.sum((2, 3), keepdim=True))
    torch.testing.assert_close(NormalisedSigmoid()(torch.full((1, 1, 2, 2), -500.0)), torch.full((1, 1, 2, 2), 0.25))


@pytest.mark.parametrize(("module", "project"), [(Sparsemax, sparsemax), (Entmax15, entmax15)])
def test_modules_normalise_each_map(module, project):
    scores = torch.randn(2, 3, 2, 4)
    found = module()(scores)
    torch.testing.assert_close(found[1, 2].flatten(), project(scores[1, 2].flatten()))


def test_invalid_temperature_raises():
    with pytest.raises(ValueError, match="temperature must be > 0, got 0"):
        Softmax(0)
