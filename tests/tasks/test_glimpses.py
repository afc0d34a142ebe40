"""Test the glimpse task: training, losses, scores, and training in two processes."""

import itertools
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader

from tests.refusals import refuses
from tests.tasks.points import trainer
from tests.tasks.spots import Columns, make_task
from visionattn.attention import Categorical, Gaussian, Retina
from visionattn.errors import UsageError
from visionattn.models.glimpse_network import Rollout
from visionattn.tasks.glimpses import on_object

BASELINES = ("none", "moving_average", "batch_mean", "learned", "self_critical", "leave_one_out")


@pytest.mark.parametrize(
    ("baseline", "reward"), list(itertools.product(BASELINES, ("log_likelihood", "confidence_gain")))
)
def test_every_parameter_trains_with_every_baseline(baseline, reward):
    task = make_task(baseline=baseline, reward=reward, entropy_weight=0.01, every_glimpse=0.5)
    before = {name: p.detach().clone() for name, p in task.named_parameters()}
    run = trainer(max_epochs=2, log_every_n_steps=1)
    run.fit(task, Columns())
    assert all(not torch.equal(p, before[name]) for name, p in task.named_parameters())
    logged = {name.removeprefix("train/") for name in run.callback_metrics if name.startswith("train/")}
    assert logged >= {"loss", "reward", "entropy", "clipped", "corners", "gradient_variance", "gradient_snr"}


def test_learned_baseline_is_trained_by_its_own_loss_only():
    task = make_task(baseline="learned")
    batch = {"image": torch.rand(4, 1, 9, 9), "label": torch.tensor([0, 1, 2, 0])}
    rollout = task.network.rollout(batch["image"], rollouts=2)
    policy_loss, value_loss, _ = task.policy_terms(batch, rollout)
    value_gradients = torch.autograd.grad(value_loss, list(task.parameters()), allow_unused=True, retain_graph=True)
    policy_gradients = torch.autograd.grad(policy_loss, list(task.parameters()), allow_unused=True)
    for (name, _), of_value, of_policy in zip(task.named_parameters(), value_gradients, policy_gradients, strict=True):
        assert (of_value is not None) == name.startswith("value."), name
        assert (of_policy is not None) == name.startswith("network.policy."), name


@pytest.mark.parametrize("policy", [Gaussian, partial(Categorical, grid=3)], ids=["gaussian", "gumbel"])
def test_pathwise_policies_learn_without_reinforce(policy):
    task = make_task(partial(policy, pathwise=True), Retina(3, subpixel=True))
    data = Columns()
    run = trainer(log_every_n_steps=1)
    before = task.network.policy.layers[-1].weight.detach().clone()
    run.fit(task, data)
    assert not torch.equal(task.network.policy.layers[-1].weight, before)
    assert "train/reward" not in run.callback_metrics


def test_test_accuracies_match_the_rollouts():
    task, data = make_task(), Columns(30)
    (scores,) = trainer().test(task, data, verbose=False)
    images, labels = (torch.stack([torch.as_tensor(s[key]) for s in data.samples]) for key in ("image", "label"))
    logits = task.network.rollout(images, locations="mean").logits[:, 0]
    for glimpse in range(3):
        accuracy = (logits[:, glimpse].argmax(-1) == labels).float().mean()
        assert scores[f"test/accuracy_after_{glimpse + 1}"] == pytest.approx(accuracy.item())
    assert scores["test/accuracy"] == scores["test/accuracy_after_3"]
    centre = task.network.rollout(images, locations="centre").logits[:, 0, -1].argmax(-1)
    assert scores["test/accuracy_centre"] == pytest.approx((centre == labels).float().mean().item())
    assert {"test/accuracy_sampled", "test/accuracy_sampled_10", "test/accuracy_random"} <= scores.keys()


def test_glimpse_task_trains_with_reinforce():
    """A glimpse at the centre shows only the middle column, so it cannot distinguish left from right."""
    torch.manual_seed(0)
    task = make_task(partial(Gaussian, std=0.3), optimizer=partial(torch.optim.Adam, lr=0.01), reward="log_likelihood")
    trainer(max_epochs=40).fit(task, Columns())
    (scores,) = trainer().test(task, Columns(), verbose=False)
    assert scores["test/accuracy"] == 1
    assert scores["test/accuracy_centre"] < 0.9


class Tallies(L.Callback):
    """Keeps the sums and counts of a test, of which Lightning adds those of all processes."""

    def on_test_epoch_end(self, trainer, task):
        self.sums = {name: (mean.mean_value.item(), mean.weight.item()) for name, mean in task._tallies.items()}


def test_a_process_without_images_leaves_the_means_of_the_others_unchanged():
    """Such a process gets one empty batch. Its fixations were once NaN, and so were those of all processes."""
    images = {
        "image": torch.rand(4, 1, 9, 9),
        "label": torch.tensor([0, 1, 2, 0]),
        "box": torch.tensor([[2.0, 2, 7, 7]] * 4),
    }
    means, sums = [], []
    for batch in (images, {name: value[:0] for name, value in images.items()}):
        run = trainer(callbacks=[tallies := Tallies()])
        means += run.test(make_task(), DataLoader([batch], batch_size=None), verbose=False)
        sums.append(tallies.sums)
    first, second = sums
    assert first.keys() == second.keys() >= {"test/fixations_on_object", "test/fixations_random"}
    for name, (total, count) in first.items():
        assert second[name] == (0, 0)
        assert total / count == pytest.approx(means[0][name])


def test_std_schedule_of_the_policy_follows_the_training():
    task = make_task(partial(Gaussian, std=(0.4, 0.1)))
    trainer(max_epochs=4).fit(task, Columns())
    assert task.network.policy.std.item() == pytest.approx(0.1)


def test_invalid_task_arguments_raise():
    refuses(ValueError, "≥ 2 with the baseline leave_one_out", make_task, rollouts=1)
    refuses(ValueError, "every_glimpse must be in", make_task, every_glimpse=2.0)


class SaveWeights(L.Callback):
    """Saves the number of steps and the weights of each process after training."""

    def on_fit_end(self, trainer, task):
        torch.save((trainer.global_step, task.state_dict()), f"{trainer.default_root_dir}/{trainer.global_rank}.pt")


def test_two_processes_train_the_same_network(tmp_path):
    several = trainer(
        strategy=DDPStrategy(start_method="forkserver"),
        devices=2,
        default_root_dir=str(tmp_path),
        callbacks=[SaveWeights()],
    )
    several.fit(make_task(baseline="learned"), Columns())
    (steps, first), (_, second) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert steps == 2  # each of 2 processes has 24 of 48 images: batches of 16 and 8
    before = make_task(baseline="learned").state_dict()
    for name, value in first.items():
        if "val_scores" not in name and "test_" not in name:
            assert torch.equal(value, second[name]), name
    assert all(
        not torch.equal(first[name], before[name]) for name, _ in make_task(baseline="learned").named_parameters()
    )


def test_on_object_counts_locations_whose_pixel_is_in_the_box():
    """At whole pixels, a location is in the box if and only if the central pixel of a 3 × 3 patch is in the box."""
    location = 2 * torch.randint(0, 21, (4, 2, 5, 2)) / 20 - 1.0
    log_prob = torch.zeros(4, 2, 4)  # 4 choices for 5 glimpses: the first location was not chosen
    rollout = Rollout(location, *[torch.zeros(0)] * 2, log_prob, *[torch.zeros(0)] * 2, ())
    box = torch.tensor([[3.0, 5, 12, 20], [0, 0, 21, 21], [4, 4, 5, 5], [20, 0, 21, 21]])
    central_pixels = Retina(3).boxes(location, (21, 21))[..., 0, :2].int() + 1
    expected = torch.zeros(4)
    for b, r, t in itertools.product(range(4), range(2), range(1, 5)):
        x, y = central_pixels[b, r, t].tolist()
        left, top, right, bottom = box[b].tolist()
        expected[b] += (left <= x < right and top <= y < bottom) / 8
    torch.testing.assert_close(on_object(rollout, box, (21, 21)), expected)


def test_training_in_16_true_is_refused():
    message = "a glimpse network cannot be trained with trainer.precision 16-true"
    refuses(UsageError, message, trainer(precision="16-true").fit, make_task(), Columns())
