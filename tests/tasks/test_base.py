"""Test the base class of the tasks: averaged weights, and the number of classes."""

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

from tests.tasks.points import Flat, Points, points, trainer
from visionattn.errors import DataError
from visionattn.tasks import Classification


def test_averaged_weights_match_the_recurrence():
    """Compare Lightning's EMA of the weights with average ← 0.8 · average + 0.2 · weights after each step."""
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


def test_wrong_number_of_classes_raises():
    images, labels = points(8)
    with pytest.raises(DataError, match="num_classes 4, and the data has 5 classes"):
        trainer().fit(Classification(Flat()), datamodule=Points(images, labels, classes=5))
    with pytest.raises(DataError, match="3 weights for 4 classes"):
        trainer().fit(Classification(Flat(), class_weights=[1, 2, 3]), datamodule=Points(images, labels))
    with pytest.raises(DataError, match="needs class_counts"):
        trainer().fit(Classification(Flat(), class_weights="balanced"), datamodule=Points(images, labels))
