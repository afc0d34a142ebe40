"""The classification task, by hand: one batch at a time, against torch, sklearn and slow loops."""

import itertools
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import nn
from torch.utils.data import DataLoader

from visionattn.attention import SE, insert
from visionattn.data import Preprocess
from visionattn.errors import DataError
from visionattn.models import ConvNet
from visionattn.tasks import Classification


class Points(L.LightningDataModule):
    """Samples that lie in memory."""

    def __init__(self, images, labels, classes=4, counts=None):
        super().__init__()
        self.samples = [{"image": x, "label": int(y)} for x, y in zip(images, labels, strict=True)]
        self.class_names = [str(number) for number in range(classes)]
        self.class_counts = counts

    def train_dataloader(self):
        return DataLoader(self.samples, batch_size=8)

    val_dataloader = test_dataloader = train_dataloader


def points(count=24, classes=4):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, classes, 6, 6, generator=generator)
    return images, torch.randint(0, classes, (count,), generator=generator)


class Flat(nn.Module):
    num_classes = 4

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        return self.linear(x.mean((2, 3)))


def trainer(**options):
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return L.Trainer(**{"enable_model_summary": False, "max_epochs": 1, **quiet, **options})


def test_test_figures_are_those_of_sklearn():
    images, labels = points(41)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.num_classes = 4
    task = Classification(network)
    run = trainer()
    (figures,) = run.test(task, datamodule=Points(images, labels), verbose=False)
    logits = images.mean((2, 3))
    answers = logits.argmax(1)
    assert figures["test/accuracy"] == pytest.approx(accuracy_score(labels, answers))
    assert figures["test/f1"] == pytest.approx(f1_score(labels, answers, average="macro"))
    assert figures["test/top5"] == 1
    np.testing.assert_array_equal(task.confusion, confusion_matrix(labels, answers))
    confidence, gap = logits.softmax(1).amax(1), 0.0
    for low in np.arange(15) / 15:  # expected calibration error, bin by bin
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            hits = (answers == labels)[inside].float()
            gap += float(inside.float().mean() * abs(hits.mean() - confidence[inside].mean()))
    assert figures["test/calibration_error"] == pytest.approx(gap, abs=1e-5)


def test_figures_that_agree_on_the_first_batch_stay_apart():
    labels = torch.arange(16) % 8
    logits = nn.functional.one_hot(labels, 8) + torch.arange(8) / 100
    logits[8:] = torch.arange(8) / 8  # class 7 first, down to class 3 in the top five
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.num_classes = 8
    data = Points(logits[:, :, None, None].expand(-1, -1, 6, 6), labels, classes=8)
    (figures,) = trainer().test(Classification(network), datamodule=data, verbose=False)
    assert figures["test/accuracy"] == pytest.approx(9 / 16)
    assert figures["test/top5"] == pytest.approx(13 / 16)


def test_the_loss_is_the_weighted_smoothed_cross_entropy():
    images, labels = points(8)
    data = Points(images, labels, counts=[1, 2, 3, 2])
    task = Classification(Flat(), label_smoothing=0.1, class_weights="balanced")
    seen = []
    task.log = lambda name, value, **_: seen.append((name, value))
    run = trainer(limit_train_batches=1)
    expected_task = Flat()
    expected_task.load_state_dict(task.network.state_dict())
    run.fit(task, datamodule=data)
    loss = next(value for name, value in seen if name == "train/loss")
    log = expected_task(images).log_softmax(1)
    weight = torch.tensor([8 / (4 * count) for count in (1, 2, 3, 2)])
    smooth = 0.9 * nn.functional.one_hot(labels, 4) + 0.1 / 4
    expected = -(smooth * weight * log).sum() / weight[labels].sum()
    torch.testing.assert_close(loss.detach(), expected.detach())


@pytest.mark.parametrize("mix", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_changes_training_batches_only(mix):
    images, labels = points()
    task = Classification(Flat(), **mix)
    seen = []
    task.network.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0].clone())))
    torch.manual_seed(0)
    trainer(num_sanity_val_steps=0).fit(task, datamodule=Points(images, labels))
    assert not torch.equal(torch.cat([x for training, x in seen if training]), images)
    assert torch.equal(torch.cat([x for training, x in seen if not training]), images)


def test_a_trained_task_knows_how_its_images_are_prepared():
    data = Points(*points())
    data.preprocess = Preprocess(6)
    task = Classification(Flat())
    assert task.preprocess is None
    trainer(fast_dev_run=True).fit(task, datamodule=data)
    assert task.preprocess == Preprocess(6)
    trainer(fast_dev_run=True).test(task, datamodule=Points(*points()), verbose=False)
    assert task.preprocess == Preprocess(6)  # data that do not say change nothing


def test_schedulers_step_when_they_should():
    images, labels = points()

    def rates(scheduler, epochs=2):
        task = Classification(Flat(), optimizer=lambda p: torch.optim.SGD(p, lr=1.0), lr_scheduler=scheduler)
        found = []
        task.on_train_batch_start = lambda *_: found.append(task.optimizers().param_groups[0]["lr"])
        trainer(max_epochs=epochs).fit(task, datamodule=Points(images, labels))
        return found

    halved = rates(lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5))
    assert halved == [1, 1, 1, 0.5, 0.5, 0.5]
    for unsaid in ({}, {"total_steps": None}):  # as Python leaves it out, and as YAML's parser does
        cycle = rates(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, **unsaid))
        assert len(set(cycle)) == 6  # with every batch, over the whole training
        assert cycle[-1] == min(cycle)
    with pytest.warns(match="Are you sure you didn't mean 'interval': 'step'"):
        said = rates(partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=100))
    assert len(set(said)) == 2  # with every epoch, as of a scheduler that knows its length
    plateau = rates(lambda o: L.pytorch.cli.ReduceLROnPlateau(o, monitor="val/loss", patience=0, threshold=100.0), 3)
    assert plateau[-1] < 1


def test_gates_of_inserted_attention_learn_at_their_own_rate():
    """With sign descent, every step is as long as the rate: γ's step over another weight's is the factor."""
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


def test_averaged_weights_are_the_moving_average():
    """Lightning's EMA over our task, against the recurrence."""
    images, labels = points()
    task = Classification(Flat(), optimizer=lambda p: torch.optim.SGD(p, lr=0.5))
    average = task.network.linear.weight.detach().clone()
    steps = []

    def note(*_):
        steps.append(task.network.linear.weight.detach().clone())

    task.on_train_batch_end = note
    trainer(callbacks=[EMAWeightAveraging(decay=0.8)], limit_val_batches=0).fit(task, datamodule=Points(images, labels))
    average = steps[0]
    for step in steps[1:]:
        average = 0.8 * average + 0.2 * step
    torch.testing.assert_close(task.network.linear.weight.detach(), average)


def test_classes_that_do_not_fit_are_named():
    images, labels = points(8)
    with pytest.raises(DataError, match="num_classes 4, and the data has 5 classes"):
        trainer().fit(Classification(Flat()), datamodule=Points(images, labels, classes=5))
    with pytest.raises(DataError, match="3 weights for 4 classes"):
        trainer().fit(Classification(Flat(), class_weights=[1, 2, 3]), datamodule=Points(images, labels))
    with pytest.raises(DataError, match="needs class_counts"):
        trainer().fit(Classification(Flat(), class_weights="balanced"), datamodule=Points(images, labels))
