"""Test optimizers and learning-rate schedules of the tasks."""

import itertools
from functools import partial

import lightning as L
import pytest
import torch

from tests.tasks.points import Linear, Points, points, trainer
from visionattn.attention import SE, insert
from visionattn.errors import UsageError
from visionattn.models import ConvNet
from visionattn.tasks import Classification


def test_schedulers_are_updated_after_every_batch_if_total_steps_is_unset_and_else_after_every_epoch():
    images, labels = points()

    def rates(scheduler, epochs=2):
        """Return the learning rate of each of the three batches of each epoch."""
        task = Classification(Linear(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), lr_scheduler=scheduler)
        found = []
        task.on_train_batch_start = lambda *_: found.append(task.optimizers().param_groups[0]["lr"])
        trainer(max_epochs=epochs).fit(task, datamodule=Points(images, labels))
        return found

    halved = rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
    assert halved == [1, 1, 1, 0.5, 0.5, 0.5]
    # Python code leaves total_steps out; the YAML parser sets it to None
    for options in ({}, {"total_steps": None}):
        cycle = rates(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, **options))
        assert len(set(cycle)) == 6  # the rate changes after every batch
        assert cycle[-1] == min(cycle)
    with pytest.warns(match="Are you sure you didn't mean 'interval': 'step'"):
        by_epoch = rates(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=100))
    assert len(set(by_epoch)) == 2  # with a given total_steps, the rate changes after every epoch
    plateau = rates(lambda o: L.pytorch.cli.ReduceLROnPlateau(o, monitor="val/loss", patience=0, threshold=100.0), 3)
    assert plateau[-1] < 1


def test_gamma_of_inserted_attention_has_its_own_rate():
    """Sign descent changes a parameter by its learning rate, so γ changes 30 times as much as a bias."""
    images, labels = points()

    class SignDescent(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad.sign(), alpha=-group["lr"])
            return loss

    network = ConvNet(4, widths=(8,), in_chans=4)
    (part,) = insert(network, SE, image=torch.zeros(4, 6, 6)).places.values()
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=None, cycle_momentum=False)
    task = Classification(
        network, optimizer=lambda p: SignDescent(p, lr=0.01), lr_scheduler=cycle, gamma_lr_factor=30.0
    )
    values = []  # γ, a bias, and the learning rate before each step

    def append_values(*_):
        values.append((part.gamma.item(), network.head.bias[0].item(), task.optimizers().param_groups[0]["lr"]))

    task.on_train_batch_start = append_values
    trainer(max_epochs=2, limit_val_batches=0, num_sanity_val_steps=0).fit(task, datamodule=Points(images, labels))
    assert len(values) == 6
    for (gamma, bias, rate), (next_gamma, next_bias, _) in itertools.pairwise(values):
        assert abs(next_bias - bias) == pytest.approx(rate, rel=1e-3)
        assert abs(next_gamma - gamma) == pytest.approx(30 * rate, rel=1e-3)


def classification(lr=0.1, schedule=None, **options):
    """Make a task with SGD and a scheduler of torch."""
    scheduler = schedule and partial(getattr(torch.optim.lr_scheduler, schedule), **options)
    return Classification(Linear(), optimizer=partial(torch.optim.SGD, lr=lr), lr_scheduler=scheduler)


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ({"lr": -0.1}, {}, "^model.init_args.optimizer cannot be built: Invalid learning rate: -0.1"),
        ({"schedule": "OneCycleLR", "max_lr": -0.1}, {}, "^the learning rate of step 0 is -0.004; "),
        ({"schedule": "StepLR", "step_size": 1, "gamma": -0.5}, {}, "^the learning rate of step 3 is -0.05; "),
        ({"schedule": "StepLR", "step_size": 0}, {}, "^step_size of the lr_scheduler must be ≥ 1, got 0"),
        ({"schedule": "OneCycleLR", "max_lr": 0.1, "pct_start": 3.0}, {}, "lr_scheduler cannot be built: Expected"),
        ({"schedule": "OneCycleLR", "max_lr": 0.1}, {"max_epochs": -1}, "has no end; set trainer.max_epochs"),
    ],
)
def test_wrong_learning_rate_is_refused_with_the_options_to_check(task, options, message):
    run = trainer(**{"max_epochs": 3, **options})
    with pytest.raises(UsageError, match=message):
        run.fit(classification(**task), datamodule=Points(*points()))


def test_schedule_of_a_checkpoint_that_ends_before_the_training_is_refused(tmp_path):
    task, data = classification(schedule="OneCycleLR", max_lr=0.1), Points(*points())
    first = trainer(max_epochs=1)
    first.fit(task, datamodule=data)
    first.save_checkpoint(tmp_path / "last.ckpt")
    message = "^the OneCycleLR, which comes from the checkpoint, ends after 3 steps, but this training has 6 steps; "
    with pytest.raises(UsageError, match=message):
        trainer(max_epochs=2).fit(task, datamodule=data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
