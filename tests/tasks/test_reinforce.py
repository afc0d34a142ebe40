"""Test the REINFORCE estimators: their mean over many rollouts equals the exact gradient, up to its standard error.

There is one image, and the policy twice chooses one of four locations, so there are sixteen paths. The exact gradient
of the expected reward is the derivative of Σ over paths of P(path) · reward(path) by the policy's weights.
"""

import itertools
from functools import partial

import pytest
import torch

from visionattn.attention import Categorical, Retina
from visionattn.models import GlimpseNetwork, MLPEncoder
from visionattn.tasks import GlimpseClassification, reinforce

LABEL = 1
REWARDS = ("correct", "log_likelihood", "confidence_gain")
BASELINES = ("none", "moving_average", "batch_mean", "learned", "self_critical", "leave_one_out")


class Scripted(Categorical):
    """A categorical policy that chooses the cells of `script`, while there are any."""

    def __init__(self, in_features, script=(), **options):
        super().__init__(in_features, grid=2, **options)
        self.script = list(script)

    def choose(self, parameters_NP, *, greedy):
        choice = super().choose(parameters_NP, greedy=greedy)
        if not self.script:
            return choice
        cell = self.script.pop(0)
        return choice._replace(
            location=self.centres[None, cell].to(parameters_NP).expand(len(parameters_NP), 2),
            log_prob=parameters_NP.log_softmax(-1)[:, cell],
        )


def make_task(**options):
    network = GlimpseNetwork(
        3, retina=Retina(2), policy=Scripted, encoder=partial(MLPEncoder, features=6), num_glimpses=3, hidden_size=5,
        glimpse_features=6, where_features=4, in_chans=1,
    )  # fmt: skip
    task = GlimpseClassification(network, **{"rollouts": 2, **options}).double()
    torch.manual_seed(24)  # with this seed, the prediction depends on the path
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.normal_(0, 0.8)
    return task, torch.randn(1, 1, 5, 5, dtype=torch.float64)


def reward_of(name, logits_K):
    """Return the reward of one rollout."""
    probability = logits_K.softmax(-1)[LABEL]
    return {
        "correct": float(logits_K.argmax() == LABEL),
        "log_likelihood": probability.log(),
        "confidence_gain": probability,  # minus p(label) before the first choice, which is constant
    }[name]


def flat(gradients):
    """Concatenate gradients to a vector."""
    return torch.cat([gradient.flatten() for gradient in gradients])


def exact_gradient(task, image, reward):
    """Return the gradient of the expected reward, from all sixteen paths."""
    expected = torch.zeros((), dtype=torch.float64)
    for path in itertools.product(range(4), repeat=2):
        task.network.policy.script = list(path)
        rollout = task.network.rollout(image)
        expected = expected + rollout.log_prob.sum().exp() * reward_of(reward, rollout.logits[0, 0, -1].detach())
    return flat(torch.autograd.grad(expected, list(task.network.policy.parameters())))


def estimates(task, image, batches, *, images=256):
    """Return (batches, parameters): the task's estimate of the gradient of the reward, from each batch."""
    batch = {"image": image.expand(images, -1, -1, -1), "label": torch.full((images,), LABEL)}
    found = []
    for _ in range(batches):
        rollout = task.network.rollout(batch["image"], rollouts=task.rollouts)
        loss, _, _ = task.policy_terms(batch, rollout)
        found.append(-flat(torch.autograd.grad(loss, list(task.network.policy.parameters()))))
    return torch.stack(found)


def deviations(found, expected):
    """Return the distance of the mean from the expected value in standard errors, for each parameter."""
    return (found.mean(0) - expected).abs() / (found.std(0) / len(found) ** 0.5)


@pytest.mark.parametrize("reward", REWARDS)
@pytest.mark.parametrize("baseline", BASELINES)
def test_estimators_are_unbiased(baseline, reward):
    task, image = make_task(baseline=baseline, reward=reward)
    exact = exact_gradient(task, image, reward)
    torch.manual_seed(1)
    found = estimates(task, image, 250 if baseline == "learned" else 40)  # an untrained baseline: high variance
    errors = deviations(found, exact)
    assert errors.max() < 4.5, errors
    # the test is sensitive: estimates that are 25 % too large would fail
    assert deviations(found, 0.8 * exact).max() > 5


def test_baselines_reduce_the_variance():
    """If rewards are far from 0, the baselines moving_average and leave_one_out reduce the gradient's variance."""
    variances = {}
    for baseline in ("none", "moving_average", "leave_one_out"):
        task, image = make_task(baseline=baseline, reward="log_likelihood", rollouts=4)
        torch.manual_seed(1)
        # the first 50 batches are for the moving average to settle
        variances[baseline] = estimates(task, image, 150, images=16)[50:].var(0).sum()
    assert variances["none"] > variances["moving_average"] > 0
    assert variances["none"] > 1.5 * variances["leave_one_out"]


def test_rewards_match_a_loop():
    torch.manual_seed(0)
    logits, labels = torch.randn(3, 2, 4, 5), torch.tensor([0, 4, 2])
    for choices in (3, 4):  # 4 glimpses; with 3 choices, the policy does not choose the location of the first glimpse
        for b, r, t in itertools.product(range(3), range(2), range(choices)):
            probabilities = [logits[b, r, glimpse].softmax(-1)[labels[b]] for glimpse in range(4)]
            before = probabilities[3 - choices + t] if 3 - choices + t >= 0 else torch.tensor(1 / 5)
            expected = {
                reinforce.correct: float(logits[b, r, 3].argmax() == labels[b]),
                reinforce.log_likelihood: float(probabilities[3].log()),
                reinforce.confidence_gain: float(probabilities[3] - before),
            }
            for reward, value in expected.items():
                assert reward(logits, labels, choices)[b, r, t].item() == pytest.approx(value, abs=1e-6)


def test_baselines_match_a_loop():
    returns = torch.randn(3, 4, 2)
    for b, r, t in itertools.product(range(3), range(4), range(2)):
        same_image = [returns[b, other, t] for other in range(4) if other != r]
        whole_batch = [returns[i, j, t] for i in range(3) for j in range(4) if (i, j) != (b, r)]
        torch.testing.assert_close(reinforce.leave_one_out(returns)[b, r, t], torch.stack(same_image).mean())
        torch.testing.assert_close(reinforce.batch_mean(returns)[b, r, t], torch.stack(whole_batch).mean())
    assert torch.equal(reinforce.batch_mean(returns[:1, :1]), torch.zeros(1, 1, 2))  # there is no other rollout
    with pytest.raises(ValueError, match="at least 2 rollouts"):
        reinforce.leave_one_out(returns[:, :1])


def test_gradient_noise_separates_signal_and_noise():
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2000, 3, generator=generator)
    variance, ratio = reinforce.gradient_noise(noise + torch.tensor([1.0, 0, 0]))
    assert variance.item() == pytest.approx(3, rel=0.1)
    assert ratio.item() == pytest.approx(2000 / 3, rel=0.1)  # squared norm 1 over the variance of the mean, 3 / 2000
    _, ratio_without_signal = reinforce.gradient_noise(noise - noise.mean(0))
    assert ratio_without_signal == 0
