"""Test the glimpse network: gradients, equations, policies, early stopping, and computation without host reads."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tests.models.glimpses import images, make, touched
from tests.refusals import refuses
from visionattn.attention import Categorical, Gaussian, Retina, TanhGaussian, TruncatedGaussian
from visionattn.errors import UsageError
from visionattn.models import Glance


@pytest.mark.parametrize("glance", [None, partial(Glance, size=6)], ids=["centre", "glance"])
def test_classification_trains_all_but_the_policy_and_log_prob_only_the_policy(glance):
    network = make(glance=glance)
    names = {name for name, _ in network.named_parameters()}
    policy = {name for name in names if name.startswith("policy.")}
    rollout = network.rollout(images(), rollouts=2)
    F.cross_entropy(rollout.logits[:, :, -1].flatten(0, 1), torch.tensor([0, 0, 3, 3])).backward(retain_graph=True)
    assert touched(network) == names - policy
    network.zero_grad()
    rollout.log_prob.sum().backward()
    assert touched(network) == policy


def test_no_location_is_chosen_after_the_last_glimpse():
    network = make()
    chosen_locations = []
    network.policy.register_forward_hook(lambda module, args, choice: chosen_locations.append(choice.location))
    rollout = network.rollout(images(), rollouts=3)
    assert len(chosen_locations) == 2  # of three glimpses, since the first is at the centre
    assert rollout.log_prob.shape == rollout.entropy.shape == rollout.clipped.shape == (2, 3, 2)
    assert torch.equal(rollout.location[:, :, 0], torch.zeros(2, 3, 2))
    for turn, location in enumerate(chosen_locations):
        assert torch.equal(rollout.location[:, :, turn + 1], location.unflatten(0, (2, 3)))
    with_glance = make(glance=Glance).rollout(images(), rollouts=3)
    assert with_glance.log_prob.shape == (2, 3, 3)
    assert with_glance.location[:, :, 0].abs().min() > 0


def test_core_matches_the_papers_equations():
    network = make(core=nn.RNNCell)
    x = images()
    rollout = network.rollout(x, locations="mean")
    hidden = torch.zeros(2, 16)
    location = torch.zeros(2, 2)
    for turn in range(3):
        patch = network.retina(x, location[:, None]).flatten(1)
        what = network.what(network.encoder.layers[1:](patch))
        hidden = network.core((what + network.where(location)).relu(), hidden)
        torch.testing.assert_close(rollout.logits[:, 0, turn], network.head(hidden))
        torch.testing.assert_close(rollout.location[:, 0, turn], location)
        location = network.policy.layers(hidden).tanh()  # the mean of the Gaussian


@pytest.mark.parametrize("policy", [Gaussian, TruncatedGaussian, TanhGaussian, Categorical])
@pytest.mark.parametrize("core", [nn.LSTMCell, nn.GRUCell, nn.RNNCell])
def test_mean_policy_is_deterministic_and_images_are_independent(policy, core):
    network = make(policy, core=core).eval()
    x = images(3, 3, 9, 14)
    torch.manual_seed(0)
    logits = network(x)
    torch.manual_seed(1)
    assert torch.equal(network(x), logits)
    torch.testing.assert_close(network(x[1:2]), logits[1:2])  # a batch of one
    torch.testing.assert_close(network.rollout(x, locations="mean", rollouts=2).logits[:, 1, -1], logits)
    sampled = network.rollout(x).location
    assert not torch.equal(network.rollout(x).location, sampled)


def test_controls_ignore_the_policy():
    network = make()
    centre = network.rollout(images(), locations="centre").location
    assert torch.equal(centre, torch.zeros_like(centre))
    random_locations = network.rollout(images(400, 3, 6, 6), locations="random").location
    assert random_locations.abs().max() <= 1
    assert random_locations.std() == pytest.approx(1 / 3**0.5, rel=0.05)  # uniform on [−1, 1]
    random_start = make(start="random")
    assert random_start.rollout(images(50, 3, 6, 6)).location[:, :, 0].abs().max() > 0.9
    assert torch.equal(random_start.rollout(images(), locations="mean").location[:, :, 0], torch.zeros(2, 1, 2))


def test_early_stopping_returns_the_prediction_at_that_glimpse():
    network = make(glance=None, num_glimpses=5).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(3)  # so that predictions differ between images and glimpses
        x = images(20, 3, 12, 10)
        logits_BTK = network.rollout(x, locations="mean").logits[:, 0]
        top_BT = logits_BTK.softmax(-1).amax(-1)  # probability of the top class
        for confidence in (0.0, float(top_BT.median()), 1.1):
            answer = network.answer(x, confidence=confidence)
            for b in range(20):
                turn = next((t for t in range(5) if top_BT[b, t] >= confidence), 4)
                assert answer.glimpses[b] == turn + 1
                torch.testing.assert_close(answer.logits[b], logits_BTK[b, turn])
    assert len({*network.answer(x, confidence=float(top_BT.median())).glimpses.tolist()}) > 1


@pytest.mark.parametrize("policy", [Gaussian, TruncatedGaussian, TanhGaussian, Categorical])
def test_no_images_give_no_rollouts(policy):
    """A process that has no images in a test gets an empty batch."""
    network = make(policy, retina=Retina(4, scales=2))
    for locations in ("sample", "mean", "random", "centre"):
        assert network.rollout(images()[:0], rollouts=2, locations=locations).logits.shape[:2] == (0, 2)


class NoHostReads(TorchDispatchMode):
    """Raise when Python reads a value of a tensor, for which a CPU would wait for the GPU."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert "_local_scalar_dense" not in str(func), "the host waits for a value"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("policy", [Gaussian, TruncatedGaussian, TanhGaussian, Categorical])
def test_rollout_reads_no_tensor_values_on_the_host_and_compiles(policy):
    network = make(policy, retina=Retina(4, scales=2))

    def step(x):
        rollout = network.rollout(x, rollouts=2)
        return rollout.logits, rollout.log_prob

    with NoHostReads():
        logits, log_prob = step(images())
        (logits.sum() + log_prob.sum()).backward()
    with pytest.raises(AssertionError, match="the host waits"), NoHostReads():
        logits.sum().item()
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.manual_seed(5)
    expected = step(images())
    torch.manual_seed(5)
    for found, reference in zip(compiled(images()), expected, strict=True):
        torch.testing.assert_close(found, reference)


def test_invalid_network_arguments_raise():
    refuses(ValueError, "num_glimpses must be", make, num_glimpses=0)
    refuses(ValueError, "start must be centre or random", make, start="corner")
    refuses(UsageError, "locations must be sample", lambda: make().rollout(images(), locations="greedy"))
