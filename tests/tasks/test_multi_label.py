"""Test the multi-label task: scores against sklearn, the loss against its equation, and data that does not fit."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, f1_score
from torch import nn

from tests.refusals import refuses
from tests.tasks.points import Linear, Points, points, trainer
from visionattn.errors import DataError, UsageError
from visionattn.maps import label_threshold, probabilities_of
from visionattn.tasks import Classification, MultiLabelClassification

NAMES = ("0", "1", "2", "3")


class Labelled(Points):
    """Random images with random labels; label 3 occurs in no image."""

    multi_label = True
    train_count = 41

    def __init__(self, count=41, batch_size=8):
        images, _ = points(count)
        super().__init__(images, torch.zeros(count), batch_size=batch_size)
        self.labels = (torch.rand(count, 4, generator=torch.Generator().manual_seed(3)) < 0.4).float()
        self.labels[:, 3] = 0
        self.class_counts = self.labels.sum(0).long().tolist()
        self.samples = [{"image": x, "label": y} for x, y in zip(images, self.labels, strict=True)]

    @property
    def logits(self):
        return torch.stack([sample["image"] for sample in self.samples]).mean((2, 3))


def plain_network():
    network = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.num_classes = 4
    return network


@pytest.mark.parametrize("threshold", [0.5, 0.48])
@pytest.mark.parametrize("batch_size", [5, 41])
def test_test_scores_match_sklearn(threshold, batch_size):
    data = Labelled(batch_size=batch_size)
    task = MultiLabelClassification(plain_network(), threshold=threshold)
    (scores,) = trainer().test(task, datamodule=data, verbose=False)
    truth, probabilities = data.labels.numpy(), data.logits.sigmoid().numpy()
    precisions = [average_precision_score(truth[:, label], probabilities[:, label]) for label in range(3)]
    for label, precision in enumerate(precisions):
        assert scores[f"test/map/{label}"] == pytest.approx(precision, abs=1e-6)
    assert scores["test/map"] == pytest.approx(np.mean(precisions), abs=1e-6)  # without label 3, which has no image
    assert "test/map/3" not in scores
    found = probabilities > threshold
    assert scores["test/f1"] == pytest.approx(f1_score(truth, found, average="macro", zero_division=0), abs=1e-6)
    assert scores["test/loss"] == pytest.approx(
        float(F.binary_cross_entropy_with_logits(data.logits, data.labels)), rel=1e-5
    )
    assert task.confusion is None


def test_loss_is_the_weighted_smoothed_focal_loss():
    data = Labelled()
    task = MultiLabelClassification(plain_network(), label_smoothing=0.2, class_weights="balanced", focal_gamma=2)
    (scores,) = trainer().test(task, datamodule=data, verbose=False)
    total = 0.0
    for row, labels in zip(data.logits.tolist(), data.labels.tolist(), strict=True):
        for logit, label, count in zip(row, labels, data.class_counts, strict=True):
            p, goal, count = 1 / (1 + math.exp(-logit)), 0.8 * label + 0.1, max(1, count)
            total -= (41 - count) / count * goal * (1 - p) ** 2 * math.log(p)
            total -= (1 - goal) * p**2 * math.log(1 - p)
    assert scores["test/loss"] == pytest.approx(total / (41 * 4), rel=1e-5)


def test_training_lowers_the_loss_and_predicts_every_label():
    torch.manual_seed(0)
    data = Labelled()
    task = MultiLabelClassification(Linear())
    before = F.binary_cross_entropy_with_logits(task.network(data.logits[..., None, None]), data.labels)
    run = trainer(max_epochs=3, num_sanity_val_steps=0)
    run.fit(task, datamodule=data)
    assert run.callback_metrics["val/loss"] < before
    assert {"val/map", "val/map/0", "val/f1", "train/loss"} <= run.callback_metrics.keys()
    batch = {"image": data.samples[0]["image"][None], "path": ["a.png"]}
    probability = task.predict_step(batch, 0)["probability"]
    torch.testing.assert_close(probability, task(batch["image"]).sigmoid())


def test_network_says_that_its_outputs_are_independent_labels():
    network = plain_network()
    logits = torch.randn(3, 4)
    assert label_threshold(network) is None
    torch.testing.assert_close(probabilities_of(network, logits), logits.softmax(1))
    MultiLabelClassification(network, threshold=0.3)
    assert label_threshold(network) == 0.3
    torch.testing.assert_close(probabilities_of(network, logits), logits.sigmoid())


def test_data_with_one_label_and_the_multi_label_task_refuse_each_other():
    message = "Labelled gives an image any number of labels, and Classification is for one label; set model to visionat"
    refuses(UsageError, message, trainer().test, Classification(plain_network()), datamodule=Labelled())

    class OneLabel(Points):
        multi_label = False

    message = "OneLabel gives an image one label, and MultiLabelClassification is for any number of labels; set model"
    data = OneLabel(*points())
    refuses(UsageError, message, trainer().test, MultiLabelClassification(plain_network()), datamodule=data)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"threshold": 0.0}, "threshold must be in"),
        ({"threshold": 1.0}, "threshold must be in"),
        ({"focal_gamma": -1.0}, "focal_gamma must be ≥ 0"),
    ],
)
def test_options_out_of_range_raise(option, message):
    refuses(ValueError, message, MultiLabelClassification, plain_network(), **option)


def test_balanced_weights_need_the_number_of_training_images():
    data, task = Labelled(), MultiLabelClassification(plain_network(), class_weights="balanced")
    data.train_count = None
    refuses(
        DataError, "balanced needs train_count, which Labelled does not have", trainer().test, task, datamodule=data
    )


def test_labels_of_data_in_another_order_are_matched_by_name():
    data = Labelled()
    task = MultiLabelClassification(plain_network())
    (expected,) = trainer().test(task, datamodule=data, verbose=False)
    order = [2, 0, 3, 1]
    data.class_names = [str(number) for number in order]
    for sample in data.samples:
        sample["label"] = sample["label"][order]
    (scores,) = trainer().test(task, datamodule=data, verbose=False)
    assert scores == pytest.approx(expected)
