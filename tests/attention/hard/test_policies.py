"""Test the policies against torch's and SciPy's distributions."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import distributions as D

from tests.refusals import refuses
from visionattn.attention import Categorical, Gaussian, TanhGaussian, TruncatedGaussian

# Policies. A state is 3 numbers; its parameters come from the policy's own layers.
STATES = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def stirred_policy(kind, **options):
    torch.manual_seed(0)
    policy = kind(3, **options).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.7)
    return policy


def moments(policy, states):
    """Return the mean before tanh and the standard deviation, from the docstrings' equations."""
    parameters = policy.layers(states)
    std = policy.std.expand(len(states), 2)
    if policy.learned_std:
        std = (policy.std * parameters[:, 2:].exp()).clamp(1e-3, 2)
    return parameters[:, :2], std


@pytest.mark.parametrize("options", [{"std": 0.3}, {"std": 0.3, "learned_std": True}, {"hidden_features": 5}], ids=str)
def test_gaussian_log_prob_is_that_of_the_unclamped_action(options):
    policy = stirred_policy(Gaussian, **options)
    mean, std = moments(policy, STATES)
    independent = D.Independent(D.Normal(mean.tanh(), std), 1)
    torch.manual_seed(3)
    action = mean.tanh() + std * torch.randn_like(mean)
    torch.manual_seed(3)
    choice = policy(STATES)
    torch.testing.assert_close(choice.location, action.clamp(-1, 1))
    torch.testing.assert_close(choice.log_prob, independent.log_prob(action))
    torch.testing.assert_close(choice.entropy, independent.entropy())
    assert torch.equal(choice.clipped, (action.abs() > 1).any(-1))
    assert choice.clipped.any() or options != {"std": 0.3}  # so that the clamp has an effect
    torch.testing.assert_close(policy(STATES, greedy=True).location, mean.tanh())


@pytest.mark.parametrize("options", [{"std": 0.7}, {"std": 0.05}, {"std": 0.7, "learned_std": True}], ids=str)
def test_truncated_gaussian_matches_scipy(options):
    policy = stirred_policy(TruncatedGaussian, **options)
    mean, std = (part.detach().numpy() for part in moments(policy, STATES))
    mean = np.tanh(mean)
    theirs = scipy.stats.truncnorm((-1 - mean) / std, (1 - mean) / std, loc=mean, scale=std)
    choice = policy(STATES)
    assert choice.location.abs().max() <= 1
    np.testing.assert_allclose(choice.log_prob.detach(), theirs.logpdf(choice.location).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(choice.entropy.detach(), theirs.entropy().sum(-1), rtol=1e-6)
    np.testing.assert_allclose(policy(STATES, greedy=True).location, mean)
    many = policy(STATES[:1].expand(4000, 3)).location
    for axis in (0, 1):
        one = scipy.stats.truncnorm(
            (-1 - mean[0, axis]) / std[0, axis], (1 - mean[0, axis]) / std[0, axis], mean[0, axis], std[0, axis]
        )
        assert scipy.stats.kstest(many[:, axis], one.cdf).pvalue > 1e-3


def test_tanh_gaussian_corrects_the_density_for_tanh():
    policy = stirred_policy(TanhGaussian, std=0.6)
    mean, std = moments(policy, STATES)
    squeezed = D.TransformedDistribution(D.Normal(mean, std), D.TanhTransform())
    choice = policy(STATES)
    torch.testing.assert_close(choice.log_prob, squeezed.log_prob(choice.location).sum(-1))
    many = policy(STATES[:1].expand(40_000, 3))
    error = (many.log_prob + many.entropy).std() / 200  # the entropy is E[−log p]; here it is estimated per sample
    assert abs((-many.log_prob).mean() - many.entropy.mean()) < 5 * error
    far = TanhGaussian(3, std=0.6).double()
    with torch.no_grad():
        far.layers[-1].bias.fill_(60.0)
    assert far(STATES).log_prob.isfinite().all()


def test_categorical_matches_torch_and_its_cells_form_the_grid():
    policy = stirred_policy(Categorical, grid=(2, 3))
    centres = [(x, y) for y in (-0.5, 0.5) for x in (-2 / 3, 0.0, 2 / 3)]
    logits = policy.layers(STATES)
    theirs = D.Categorical(logits=logits)
    choice = policy(STATES)
    cells = [
        next(n for n, centre in enumerate(centres) if np.allclose(place, centre)) for place in choice.location.tolist()
    ]
    torch.testing.assert_close(choice.log_prob, theirs.log_prob(torch.tensor(cells)))
    torch.testing.assert_close(choice.entropy, theirs.entropy())
    likeliest = torch.tensor(centres, dtype=torch.float64)[logits.argmax(-1)]
    torch.testing.assert_close(policy(STATES, greedy=True).location, likeliest)


@pytest.mark.parametrize("pathwise", [False, True])
def test_categorical_samples_have_the_right_frequencies(pathwise):
    policy = stirred_policy(Categorical, grid=2, pathwise=pathwise)
    locations = policy(STATES[:1].expand(8000, 3)).location.detach()
    cells = (locations[:, 1] > 0) * 2 + (locations[:, 0] > 0)
    expected = 8000 * policy.layers(STATES[:1]).softmax(-1)[0].detach()
    assert scipy.stats.chisquare(torch.bincount(cells.long(), minlength=4), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("kind", [Gaussian, TruncatedGaussian, TanhGaussian, Categorical])
def test_location_has_a_gradient_only_if_pathwise(kind):
    options = {} if kind is Categorical else {"std": 0.1}
    assert not stirred_policy(kind, **options)(STATES).location.requires_grad
    choice = stirred_policy(kind, pathwise=True, **options)(STATES)
    gradients = torch.autograd.grad(choice.location.sum(), choice.parameters)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    policy = stirred_policy(kind, hidden_features=4, **options)
    policy(STATES).log_prob.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in policy.parameters())


def test_scheduled_std_decreases_geometrically():
    policy = Gaussian(3, std=(0.4, 0.1))
    for share, std in ((0.0, 0.4), (0.5, 0.2), (1.0, 0.1)):
        policy.progress(share)
        assert policy.std.item() == pytest.approx(std)
    fixed = Gaussian(3, std=0.3)
    fixed.progress(1.0)
    assert fixed.std.item() == pytest.approx(0.3)


def test_invalid_policy_arguments_raise():
    refuses(ValueError, "std must be > 0", Gaussian, 3, std=0.0)
    refuses(ValueError, "scheduled or learned, not both", Gaussian, 3, std=(0.3, 0.1), learned_std=True)
    refuses(ValueError, "grid must be", Categorical, 3, grid=0)
