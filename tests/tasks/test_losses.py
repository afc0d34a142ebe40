"""Test the losses: focal losses against slow loops, torch and torchvision, and weights against their equations."""

import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from tests.refusals import refuses
from visionattn.errors import DataError
from visionattn.tasks.losses import class_weights_of, focal_binary_cross_entropy, focal_cross_entropy

B, K = 7, 4


@pytest.fixture
def logits():
    return 3 * torch.randn(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


LABELS = torch.arange(B) % K
SOFT = torch.rand(B, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).softmax(1)
WEIGHTS = torch.tensor([1.0, 4.0, 0.5, 2.0], dtype=torch.float64)


@pytest.mark.parametrize("labels", [LABELS, SOFT], ids=["numbers", "probabilities"])
@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["equal", "weights"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_gamma_0_is_the_cross_entropy_of_torch(logits, labels, weight, smoothing):
    ours = focal_cross_entropy(logits, labels, gamma=0, weight_K=weight, label_smoothing=smoothing)
    torch.testing.assert_close(ours, F.cross_entropy(logits, labels, weight=weight, label_smoothing=smoothing))


@pytest.mark.parametrize("gamma", [0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("weight", [None, WEIGHTS], ids=["equal", "weights"])
def test_softmax_focal_loss_follows_the_paper(logits, gamma, weight):
    loss, total = 0.0, 0.0
    for row, label in zip(logits.tolist(), LABELS.tolist(), strict=True):
        p = math.exp(row[label]) / sum(map(math.exp, row))
        alpha = 1.0 if weight is None else float(weight[label])
        loss -= alpha * (1 - p) ** gamma * math.log(p)
        total += alpha
    ours = focal_cross_entropy(logits, LABELS, gamma=gamma, weight_K=weight)
    assert float(ours) == pytest.approx(loss / total, rel=1e-9)


def present(logits):
    return (torch.rand(logits.shape, generator=torch.Generator().manual_seed(2)) < 0.4).double()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
@pytest.mark.parametrize("alpha", [None, 0.25, 0.6])
def test_sigmoid_focal_loss_is_that_of_torchvision(logits, gamma, alpha):
    weight = None if alpha is None else torch.full((K,), alpha / (1 - alpha), dtype=torch.float64)
    ours = focal_binary_cross_entropy(logits, present(logits), gamma=gamma, positive_weight_K=weight)
    theirs = sigmoid_focal_loss(logits, present(logits), alpha=alpha or -1, gamma=gamma, reduction="mean")
    torch.testing.assert_close(ours * (1 if alpha is None else 1 - alpha), theirs)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_sigmoid_focal_loss_follows_the_paper(logits, gamma):
    loss = 0.0
    for row, goals in zip(logits.tolist(), present(logits).tolist(), strict=True):
        for logit, goal, weight in zip(row, goals, WEIGHTS.tolist(), strict=True):
            p = 1 / (1 + math.exp(-logit))
            loss -= weight * (1 - p) ** gamma * math.log(p) if goal else p**gamma * math.log(1 - p)
    ours = focal_binary_cross_entropy(logits, present(logits), gamma=gamma, positive_weight_K=WEIGHTS)
    assert float(ours) == pytest.approx(loss / (B * K), rel=1e-9)


def test_sigmoid_loss_with_gamma_0_is_that_of_torch_also_for_smoothed_labels(logits):
    goal = 0.9 * present(logits) + 0.05
    ours = focal_binary_cross_entropy(logits, goal, gamma=0, positive_weight_K=WEIGHTS)
    torch.testing.assert_close(ours, F.binary_cross_entropy_with_logits(logits, goal, pos_weight=WEIGHTS))


@pytest.mark.parametrize("gamma", [0.3, 1.0, 2.0])
def test_gradients_are_finite_where_the_network_is_certain(gamma):
    extreme = torch.tensor([[100.0, -100, -100, 0], [-100, 100, 0, -50]], requires_grad=True)
    loss = focal_cross_entropy(extreme, torch.tensor([0, 0]), gamma=gamma)
    loss = loss + focal_binary_cross_entropy(extreme, torch.eye(2, 4), gamma=gamma)
    (gradient,) = torch.autograd.grad(loss, extreme)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    assert gradient[1, 0] < 0  # the certain and wrong answer is corrected


def test_class_weights_follow_their_equation_in_the_order_of_the_task():
    class Data:
        class_counts = (6, 0, 3)

    class Nothing:
        pass

    def weights(given, data=Data, numbers=None):
        return class_weights_of(given, data(), 3, lambda counts_K: 9 / counts_K, label_numbers=numbers)

    assert weights(None) is None
    assert weights([1, 2, 3]).tolist() == [1, 2, 3]
    assert weights("balanced").tolist() == [1.5, 9, 3]  # a class without images counts as one image
    assert weights("balanced", numbers=[2, 0, 1]).tolist() == [9, 3, 1.5]
    refuses(DataError, "class_weights has 2 weights for 3 classes", weights, [1, 2])
    refuses(DataError, "balanced needs class_counts, which Nothing does not have", weights, "balanced", Nothing)
