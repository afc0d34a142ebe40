"""Test the glimpse task: losses, scores, two processes."""

import itertools
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

from tests.refusals import refuses
from tests.tasks.points import trainer
from tests.tasks.spots import Spots, make
from visionattn.attention import Categorical, Gaussian, Retina
from visionattn.models.glimpse_network import Rollout
from visionattn.tasks.glimpses import on_object

BASELINES = ("none", "moving_average", "batch_mean", "learned", "self_critical", "leave_one_out")


@pytest.mark.parametrize(
    ("baseline", "reward"), list(itertools.product(BASELINES, ("log_likelihood", "confidence_gain")))
)
def test_every_baseline_trains(baseline, reward):
    task = make(baseline=baseline, reward=reward, entropy_weight=0.01, every_glimpse=0.5)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    run = trainer(max_epochs=2, log_every_n_steps=1)
    run.fit(task, Spots())
    assert all(not torch.equal(p, before[name]) for name, p in task.named_parameters())
    logged = {name.removeprefix("train/") for name in run.callback_metrics if name.startswith("train/")}
    assert logged >= {"loss", "reward", "entropy", "clipped", "corners", "gradient_variance", "gradient_snr"}


def test_learned_baseline_is_trained_by_its_own_loss_only():
    task = make(baseline="learned")
    batch = {"image": torch.rand(4, 1, 9, 9), "label": torch.tensor([0, 1, 2, 0])}
    rollout = task.network.rollout(batch["image"], rollouts=2)
    policy_loss, value_loss, _ = task.policy_terms(batch, rollout)
    of_value = torch.autograd.grad(value_loss, list(task.parameters()), allow_unused=True, retain_graph=True)
    of_policy = torch.autograd.grad(policy_loss, list(task.parameters()), allow_unused=True)
    for (name, _), value, policy in zip(task.named_parameters(), of_value, of_policy, strict=True):
        assert (value is not None) == name.startswith("value."), name
        assert (policy is not None) == name.startswith("network.policy."), name


@pytest.mark.parametrize("policy", [Gaussian, partial(Categorical, grid=3)], ids=["gaussian", "gumbel"])
def test_pathwise_policies_learn_through_the_location_only(policy):
    task = make(partial(policy, pathwise=True), Retina(3, subpixel=True))
    data = Spots()
    run = trainer(log_every_n_steps=1)
    before = task.network.policy.layers[-1].weight.detach().clone()
    run.fit(task, data)
    assert not torch.equal(task.network.policy.layers[-1].weight, before)
    assert "train/reward" not in run.callback_metrics


def test_test_scores_match_the_rollouts():
    task, data = make(), Spots(30)
    (figures,) = trainer().test(task, data, verbose=False)
    images, labels = (torch.stack([torch.as_tensor(s[key]) for s in data.samples]) for key in ("image", "label"))
    believed = task.network.rollout(images, locations="mean").logits[:, 0]
    for turn in range(3):
        right = (believed[:, turn].argmax(-1) == labels).float().mean()
        assert figures[f"test/accuracy_after_{turn + 1}"] == pytest.approx(right.item())
    assert figures["test/accuracy"] == figures["test/accuracy_after_3"]
    centre = task.network.rollout(images, locations="centre").logits[:, 0, -1].argmax(-1)
    assert figures["test/accuracy_centre"] == pytest.approx((centre == labels).float().mean().item())
    assert {"test/accuracy_sampled", "test/accuracy_sampled_10", "test/accuracy_random"} <= figures.keys()


def test_glimpse_task_trains_with_reinforce():
    """The class is at the edge of the first glimpse, so that centre glimpses can distinguish two of three classes."""
    torch.manual_seed(0)
    task = make(partial(Gaussian, std=0.3), optimizer=partial(torch.optim.Adam, lr=0.01), reward="log_likelihood")
    trainer(max_epochs=40).fit(task, Spots())
    (figures,) = trainer().test(task, Spots(), verbose=False)
    assert figures["test/accuracy"] == 1
    assert figures["test/accuracy_centre"] < 0.9


def test_policy_is_told_the_progress_of_the_training():
    task = make(partial(Gaussian, std=(0.4, 0.1)))
    trainer(max_epochs=4).fit(task, Spots())
    assert task.network.policy.std.item() == pytest.approx(0.1)


def test_invalid_task_arguments_raise():
    refuses(ValueError, "≥ 2 with the baseline leave_one_out", make, rollouts=1)
    refuses(ValueError, "every_glimpse must be in", make, every_glimpse=2.0)


DDP = """
import sys
import torch
from tests.refusals import refuses
from tests.tasks.points import trainer
from tests.tasks.spots import Spots, make

torch.set_num_threads(1)
task = make(baseline="learned")
run = trainer(strategy="ddp", devices=2, default_root_dir=sys.argv[1])
run.fit(task, Spots())
torch.save((run.global_step, task.state_dict()), f"{sys.argv[1]}/{run.global_rank}.pt")
"""


def test_two_processes_train_the_same_network(tmp_path):
    script = tmp_path / "train.py"
    script.write_text(DDP)
    paths = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    run = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    (steps, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert steps == 2  # 48 images, 2 processes, batches of 16, the last one of 8
    before = make(baseline="learned").state_dict()
    for name, value in first.items():
        if "val_scores" not in name and "test_" not in name:
            assert torch.equal(value, second[name]), name
    assert all(not torch.equal(first[name], before[name]) for name, _ in make(baseline="learned").named_parameters())


def test_fixation_is_on_the_object_if_its_pixel_is():
    """For an odd patch at whole pixels, the fixation is in the box if the patch's central pixel is."""
    location = 2 * torch.randint(0, 21, (4, 2, 5, 2)) / 20 - 1.0
    log_prob = torch.zeros(4, 2, 4)  # the first location was not chosen
    rollout = Rollout(location, *[torch.zeros(0)] * 2, log_prob, *[torch.zeros(0)] * 2, ())
    box = torch.tensor([[3.0, 5, 12, 20], [0, 0, 21, 21], [4, 4, 5, 5], [20, 0, 21, 21]])
    middles = Retina(3).boxes(location, (21, 21))[..., 0, :2].int() + 1
    expected = torch.zeros(4)
    for b, r, t in itertools.product(range(4), range(2), range(1, 5)):
        x, y = middles[b, r, t].tolist()
        left, top, right, bottom = box[b].tolist()
        expected[b] += (left <= x < right and top <= y < bottom) / 8
    torch.testing.assert_close(on_object(rollout, box, (21, 21)), expected)
