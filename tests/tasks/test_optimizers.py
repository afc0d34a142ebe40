"""Test optimizers and schedules from the configuration."""

import itertools
from functools import partial

import lightning as L
import pytest
import torch

from tests.tasks.points import Flat, Points, points, trainer
from visionattn.attention import SE, insert
from visionattn.models import ConvNet
from visionattn.tasks import Classification


def test_schedulers_step_at_the_right_interval():
    images, labels = points()

    def rates(scheduler, epochs=2):
        task = Classification(Flat(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), lr_scheduler=scheduler)
        found = []
        task.on_train_batch_start = lambda *_: found.append(task.optimizers().param_groups[0]["lr"])
        trainer(max_epochs=epochs).fit(task, datamodule=Points(images, labels))
        return found

    halved = rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
    assert halved == [1, 1, 1, 0.5, 0.5, 0.5]
    for unsaid in (
        {},
        {"total_steps": None},
    ):  # total_steps left out, as in Python, and set to None, as by the YAML parser
        cycle = rates(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, **unsaid))
        assert len(set(cycle)) == 6  # steps after every batch, over the whole training
        assert cycle[-1] == min(cycle)
    with pytest.warns(match="Are you sure you didn't mean 'interval': 'step'"):
        said = rates(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=100))
    assert len(set(said)) == 2  # a scheduler with a given total_steps steps after every epoch
    plateau = rates(lambda o: L.pytorch.cli.ReduceLROnPlateau(o, monitor="val/loss", patience=0, threshold=100.0), 3)
    assert plateau[-1] < 1


def test_gamma_of_inserted_attention_has_its_own_rate():
    """In sign descent every step is as long as its learning rate, so γ's step is 30 times that of another parameter."""
    images, labels = points()

    class Signs(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter.data.add_(parameter.grad.sign(), alpha=-group["lr"])
            return loss

    network = ConvNet(4, widths=(8,), in_chans=4)
    (part,) = insert(network, SE, image=torch.zeros(4, 6, 6)).places.values()
    cycle = partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.01, total_steps=None, cycle_momentum=False)
    task = Classification(network, optimizer=lambda p: Signs(p, lr=0.01), lr_scheduler=cycle, gamma_lr_factor=30.0)
    steps = []

    def note(*_):
        steps.append((part.gamma.item(), network.head.bias[0].item(), task.optimizers().param_groups[0]["lr"]))

    task.on_train_batch_start = note
    trainer(max_epochs=2, limit_val_batches=0, num_sanity_val_steps=0).fit(task, datamodule=Points(images, labels))
    assert len(steps) == 6
    for (gamma, bias, rate), (next_gamma, next_bias, _) in itertools.pairwise(steps):
        assert abs(next_bias - bias) == pytest.approx(rate, rel=1e-3)
        assert abs(next_gamma - gamma) == pytest.approx(30 * rate, rel=1e-3)
