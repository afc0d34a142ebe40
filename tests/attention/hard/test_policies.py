"""Test the policies against torch's and SciPy's distributions."""

import numpy as np
import pytest
import scipy.stats
import torch
from torch import distributions as D

from tests.refusals import refuses
from visionattn.attention import Categorical, Gaussian, TanhGaussian, TruncatedGaussian

# D = 3 features for each of N = 6 decisions
STATES = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def random_policy(kind, **options):
    """Make a policy with large random weights, so that its parameters depend on the state."""
    torch.manual_seed(0)
    policy = kind(3, **options).double()
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.normal_(0, 0.7)
    return policy


def mean_and_std(policy, states):
    """Return the mean before tanh and the standard deviation, from the equations of the docstrings."""
    parameters = policy.layers(states)
    std = policy.std.expand(len(states), 2)
    if policy.learned_std:
        std = (policy.std * parameters[:, 2:].exp()).clamp(1e-3, 2)
    return parameters[:, :2], std


@pytest.mark.parametrize("options", [{"std": 0.3}, {"std": 0.3, "learned_std": True}, {"hidden_features": 5}], ids=str)
def test_gaussian_log_prob_uses_the_unclamped_action(options):
    policy = random_policy(Gaussian, **options)
    mean, std = mean_and_std(policy, STATES)
    independent = D.Independent(D.Normal(mean.tanh(), std), 1)
    torch.manual_seed(3)
    action = mean.tanh() + std * torch.randn_like(mean)
    torch.manual_seed(3)
    choice = policy(STATES)
    torch.testing.assert_close(choice.location, action.clamp(-1, 1))
    torch.testing.assert_close(choice.log_prob, independent.log_prob(action))
    torch.testing.assert_close(choice.entropy, independent.entropy())
    assert torch.equal(choice.clipped, (action.abs() > 1).any(-1))
    assert choice.clipped.any() or options != {"std": 0.3}  # the clamp has an effect in at least one case
    torch.testing.assert_close(policy(STATES, greedy=True).location, mean.tanh())


@pytest.mark.parametrize("options", [{"std": 0.7}, {"std": 0.05}, {"std": 0.7, "learned_std": True}], ids=str)
def test_truncated_gaussian_matches_scipy(options):
    policy = random_policy(TruncatedGaussian, **options)
    mean, std = (part.detach().numpy() for part in mean_and_std(policy, STATES))
    mean = np.tanh(mean)
    reference = scipy.stats.truncnorm((-1 - mean) / std, (1 - mean) / std, loc=mean, scale=std)
    choice = policy(STATES)
    assert choice.location.abs().max() <= 1
    np.testing.assert_allclose(choice.log_prob.detach(), reference.logpdf(choice.location).sum(-1), rtol=1e-6)
    np.testing.assert_allclose(choice.entropy.detach(), reference.entropy().sum(-1), rtol=1e-6)
    np.testing.assert_allclose(policy(STATES, greedy=True).location, mean)
    samples = policy(STATES[:1].expand(4000, 3)).location
    for axis in (0, 1):
        reference = scipy.stats.truncnorm(
            (-1 - mean[0, axis]) / std[0, axis], (1 - mean[0, axis]) / std[0, axis], mean[0, axis], std[0, axis]
        )
        assert scipy.stats.kstest(samples[:, axis], reference.cdf).pvalue > 1e-3


def test_tanh_gaussian_corrects_the_density_for_tanh():
    policy = random_policy(TanhGaussian, std=0.6)
    mean, std = mean_and_std(policy, STATES)
    squeezed = D.TransformedDistribution(D.Normal(mean, std), D.TanhTransform())
    choice = policy(STATES)
    torch.testing.assert_close(choice.log_prob, squeezed.log_prob(choice.location).sum(-1))
    samples = policy(STATES[:1].expand(40_000, 3))
    standard_error = (samples.log_prob + samples.entropy).std() / 200  # 200 = √40,000
    # the entropy is E[−log p], so both estimates have the same mean
    assert abs((-samples.log_prob).mean() - samples.entropy.mean()) < 5 * standard_error
    saturated = TanhGaussian(3, std=0.6).double()
    with torch.no_grad():
        saturated.layers[-1].bias.fill_(60.0)  # tanh(60) rounds to 1, where log(1 − tanh²) is −∞
    assert saturated(STATES).log_prob.isfinite().all()


def test_categorical_matches_torch_and_chooses_centres_of_cells():
    policy = random_policy(Categorical, grid=(2, 3))
    centres = [(x, y) for y in (-0.5, 0.5) for x in (-2 / 3, 0.0, 2 / 3)]
    logits = policy.layers(STATES)
    reference = D.Categorical(logits=logits)
    choice = policy(STATES)
    cells = [
        next(n for n, centre in enumerate(centres) if np.allclose(location, centre))
        for location in choice.location.tolist()
    ]
    torch.testing.assert_close(choice.log_prob, reference.log_prob(torch.tensor(cells)))
    torch.testing.assert_close(choice.entropy, reference.entropy())
    most_likely = torch.tensor(centres, dtype=torch.float64)[logits.argmax(-1)]
    torch.testing.assert_close(policy(STATES, greedy=True).location, most_likely)


@pytest.mark.parametrize("pathwise", [False, True])
def test_categorical_samples_have_the_right_frequencies(pathwise):
    policy = random_policy(Categorical, grid=2, pathwise=pathwise)
    locations = policy(STATES[:1].expand(8000, 3)).location.detach()
    cells = (locations[:, 1] > 0) * 2 + (locations[:, 0] > 0)
    expected = 8000 * policy.layers(STATES[:1]).softmax(-1)[0].detach()
    assert scipy.stats.chisquare(torch.bincount(cells.long(), minlength=4), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("kind", [Gaussian, TruncatedGaussian, TanhGaussian, Categorical])
def test_location_has_a_gradient_only_if_policy_is_pathwise(kind):
    options = {} if kind is Categorical else {"std": 0.1}
    assert not random_policy(kind, **options)(STATES).location.requires_grad
    choice = random_policy(kind, pathwise=True, **options)(STATES)
    gradients = torch.autograd.grad(choice.location.sum(), choice.parameters)
    assert all(gradient.abs().sum() > 0 for gradient in gradients)
    policy = random_policy(kind, hidden_features=4, **options)
    policy(STATES).log_prob.sum().backward()
    assert all(parameter.grad is not None and parameter.grad.abs().sum() > 0 for parameter in policy.parameters())


def test_scheduled_std_is_interpolated_geometrically():
    policy = Gaussian(3, std=(0.4, 0.1))
    for progress, std in ((0.0, 0.4), (0.5, 0.2), (1.0, 0.1)):
        policy.progress(progress)
        assert policy.std.item() == pytest.approx(std)
    fixed = Gaussian(3, std=0.3)
    fixed.progress(1.0)
    assert fixed.std.item() == pytest.approx(0.3)


def test_invalid_policy_arguments_raise():
    refuses(ValueError, "std must be > 0", Gaussian, 3, std=0.0)
    refuses(ValueError, "scheduled or learned, not both", Gaussian, 3, std=(0.3, 0.1), learned_std=True)
    refuses(ValueError, "grid must be", Categorical, 3, grid=0)
