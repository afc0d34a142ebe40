"""Test the classification task: scores against sklearn, the loss against its equation, and mixing of images."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import nn

from tests.tasks.points import Linear, Points, points, trainer
from visionattn.data import Preprocess
from visionattn.tasks import Classification


def test_test_scores_match_sklearn():
    images, labels = points(41)
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.num_classes = 4
    task = Classification(network)
    (scores,) = trainer().test(task, datamodule=Points(images, labels), verbose=False)
    logits = images.mean((2, 3))
    predictions = logits.argmax(1)
    assert scores["test/accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    assert scores["test/f1"] == pytest.approx(f1_score(labels, predictions, average="macro"))
    assert scores["test/top5"] == 1
    np.testing.assert_array_equal(task.confusion, confusion_matrix(labels, predictions))
    confidence, calibration_error = logits.softmax(1).amax(1), 0.0
    for low in np.arange(15) / 15:  # expected calibration error, bin by bin
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            hits = (predictions == labels)[inside].float()
            calibration_error += float(inside.float().mean() * abs(hits.mean() - confidence[inside].mean()))
    assert scores["test/calibration_error"] == pytest.approx(calibration_error, abs=1e-5)


def test_metrics_that_are_equal_on_the_first_batch_stay_separate():
    labels = torch.arange(16) % 8
    # all 8 images of the first batch are classified correctly
    logits = nn.functional.one_hot(labels, 8) + torch.arange(8) / 100
    logits[8:] = torch.arange(8) / 8  # in the second batch, the top five classes are always 7 to 3
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.num_classes = 8
    data = Points(logits[:, :, None, None].expand(-1, -1, 6, 6), labels, classes=8)
    (scores,) = trainer().test(Classification(network), datamodule=data, verbose=False)
    assert scores["test/accuracy"] == pytest.approx(9 / 16)
    assert scores["test/top5"] == pytest.approx(13 / 16)


def test_loss_is_the_weighted_smoothed_cross_entropy():
    images, labels = points(8)
    data = Points(images, labels, counts=[1, 2, 3, 2])
    task = Classification(Linear(), label_smoothing=0.1, class_weights="balanced")
    logged = []
    task.log = lambda name, value, **_: logged.append((name, value))
    run = trainer(limit_train_batches=1)
    network = Linear()  # with the weights before the step
    network.load_state_dict(task.network.state_dict())
    run.fit(task, datamodule=data)
    loss = next(value for name, value in logged if name == "train/loss")
    log_probabilities = network(images).log_softmax(1)
    weight = torch.tensor([8 / (4 * count) for count in (1, 2, 3, 2)])
    smoothed = 0.9 * nn.functional.one_hot(labels, 4) + 0.1 / 4
    expected = -(smoothed * weight * log_probabilities).sum() / weight[labels].sum()
    torch.testing.assert_close(loss.detach(), expected.detach())


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.4, "cutmix": 1.0}])
def test_mixing_changes_training_batches_only(options):
    images, labels = points()
    task = Classification(Linear(), **options)
    inputs = []
    task.network.register_forward_pre_hook(lambda module, args: inputs.append((module.training, args[0].clone())))
    torch.manual_seed(0)
    trainer(num_sanity_val_steps=0).fit(task, datamodule=Points(images, labels))
    assert not torch.equal(torch.cat([x for training, x in inputs if training]), images)
    assert torch.equal(torch.cat([x for training, x in inputs if not training]), images)


def test_task_keeps_the_preprocess_of_its_data():
    data = Points(*points())
    data.preprocess = Preprocess(6)
    task = Classification(Linear())
    assert task.preprocess is None
    trainer(fast_dev_run=True).fit(task, datamodule=data)
    assert task.preprocess == Preprocess(6)
    trainer(fast_dev_run=True).test(task, datamodule=Points(*points()), verbose=False)
    assert task.preprocess == Preprocess(6)  # unchanged, since this data has no preprocess


@pytest.mark.parametrize("batch_size", [1, 3, 8, 16])
@pytest.mark.parametrize(("weights", "smoothing"), [([1.0, 5.0, 0.5, 2.0], 0.1), ([1.0, 5.0, 0.0, 2.0], 0.0)])
def test_validation_loss_with_class_weights_does_not_depend_on_the_batch_size(batch_size, weights, smoothing):
    images, labels = points(16)
    task = Classification(Linear(), class_weights=weights, label_smoothing=smoothing)
    data = Points(images, labels, batch_size=batch_size)
    (scores,) = trainer().test(task, datamodule=data, verbose=False)
    weight = torch.tensor(weights)
    expected = nn.functional.cross_entropy(task.network(images), labels, weight=weight, label_smoothing=smoothing)
    assert scores["test/loss"] == pytest.approx(float(expected.detach()), rel=1e-5)


def calibration_error_by_hand(probability, labels, bins=15):
    confidence, predicted = probability.max(1)
    error = 0.0
    for low in range(bins):
        inside = (confidence > low / bins) & (confidence <= (low + 1) / bins)
        if inside.any():
            right = (predicted[inside] == labels[inside]).float().mean()
            error += float(inside.float().mean() * (right - confidence[inside].mean()).abs())
    return error


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_calibration_error_is_that_of_the_probabilities_also_for_logits_between_0_and_1(scale):
    torch.manual_seed(0)
    logits, labels = scale * torch.rand(64, 4), torch.randint(4, (64,))
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.num_classes = 4
    data = Points(logits[:, :, None, None].expand(-1, -1, 6, 6), labels, classes=4)
    (scores,) = trainer().test(Classification(network), datamodule=data, verbose=False)
    expected = calibration_error_by_hand(logits.softmax(1), labels)
    assert scores["test/calibration_error"] == pytest.approx(expected, abs=1e-5)
