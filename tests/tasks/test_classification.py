"""Test the classification task, batch by batch, against torch, sklearn and slow loops."""

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from torch import nn

from tests.tasks.points import Flat, Points, points, trainer
from visionattn.data import Preprocess
from visionattn.tasks import Classification


def test_test_scores_match_sklearn():
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


def test_scores_equal_on_the_first_batch_stay_separate():
    labels = torch.arange(16) % 8
    logits = nn.functional.one_hot(labels, 8) + torch.arange(8) / 100
    logits[8:] = torch.arange(8) / 8  # the top five classes are 7, 6, 5, 4 and 3, in this order
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.num_classes = 8
    data = Points(logits[:, :, None, None].expand(-1, -1, 6, 6), labels, classes=8)
    (figures,) = trainer().test(Classification(network), datamodule=data, verbose=False)
    assert figures["test/accuracy"] == pytest.approx(9 / 16)
    assert figures["test/top5"] == pytest.approx(13 / 16)


def test_loss_is_the_weighted_smoothed_cross_entropy():
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


def test_task_keeps_the_preprocess_of_its_data():
    data = Points(*points())
    data.preprocess = Preprocess(6)
    task = Classification(Flat())
    assert task.preprocess is None
    trainer(fast_dev_run=True).fit(task, datamodule=data)
    assert task.preprocess == Preprocess(6)
    trainer(fast_dev_run=True).test(task, datamodule=Points(*points()), verbose=False)
    assert task.preprocess == Preprocess(6)  # data without a preprocess change nothing
