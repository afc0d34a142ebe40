"""Losses for rare classes: weights of classes, and focal losses (Lin et al. 2017, 1708.02002).

A focal loss gives well-classified examples less weight.

Shapes: B images, K classes.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.errors import DataError


def focal_cross_entropy(
    logits_BK: Tensor,
    labels: Tensor,
    *,
    gamma: float,
    weight_K: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Compute the focal loss of a softmax over classes.

        loss = −Σ_k w_k y_k (1 − p_k)^γ log p_k,    p = softmax(logits)

    This is the paper's −(1 − p_t)^γ log p_t for a true class t, extended to smoothed and mixed labels y. With γ = 0 it
    is `F.cross_entropy`, and the mean is taken as there: over the images for labels of probabilities, and otherwise
    weighted by the weight of each image's class.

    Args:
        logits_BK: (B, K).
        labels: (B,) int64, or probabilities (B, K).
        gamma: γ ≥ 0.
        weight_K: w, the weight of each class (default: 1).
        label_smoothing: fraction of y that is spread evenly over all classes, in [0, 1).

    Returns:
        The mean, a scalar.
    """
    num_classes = logits_BK.shape[1]
    given_BK = F.one_hot(labels, num_classes).to(logits_BK.dtype) if labels.ndim == 1 else labels
    goal_BK = given_BK * (1 - label_smoothing) + label_smoothing / num_classes
    log_p_BK = logits_BK.log_softmax(1)
    loss_BK = -goal_BK * _rest(log_p_BK) ** gamma * log_p_BK
    if weight_K is None:
        return loss_BK.sum() / len(logits_BK)
    total = (given_BK * weight_K).sum() if labels.ndim == 1 else len(logits_BK)
    return (loss_BK * weight_K).sum() / total


def focal_binary_cross_entropy(
    logits_BK: Tensor, goal_BK: Tensor, *, gamma: float, positive_weight_K: Tensor | None = None
) -> Tensor:
    """Compute the focal loss of independent labels.

        loss = −w_k y (1 − p)^γ log p − (1 − y) p^γ log(1 − p),    p = sigmoid(logit)

    The paper's α is the weight w_k = α / (1 − α) here, with which the loss is the paper's, divided by 1 − α. With γ = 0
    it is `F.binary_cross_entropy_with_logits`.

    Args:
        logits_BK: (B, K).
        goal_BK: y in [0, 1], (B, K).
        gamma: γ ≥ 0.
        positive_weight_K: w, the weight of each class where the label is present (default: 1).

    Returns:
        The mean over images and classes, a scalar.
    """
    log_p_BK, log_other_BK = F.logsigmoid(logits_BK), F.logsigmoid(-logits_BK)
    present_BK = -goal_BK * _rest(log_p_BK) ** gamma * log_p_BK
    absent_BK = -(1 - goal_BK) * _rest(log_other_BK) ** gamma * log_other_BK
    return (present_BK * (1 if positive_weight_K is None else positive_weight_K) + absent_BK).mean()


def _rest(log_p: Tensor) -> Tensor:
    """Return 1 − p; not exactly 0, where the gradient of a power with an exponent below 1 is infinite."""
    return (-torch.expm1(log_p)).clamp_min(torch.finfo(log_p.dtype).tiny)


def check_gamma(gamma: float) -> None:
    """Check the γ of a focal loss; raise ValueError if it is negative."""
    if gamma < 0:
        raise ValueError(f"focal_gamma must be ≥ 0, got {gamma}")


def class_weights_of(
    class_weights: Sequence[float] | str | None,
    data: object,
    num_classes: int,
    balanced: Callable[[Tensor], Tensor],
    *,
    label_numbers: Sequence[int] | None,
) -> Tensor | None:
    """Return the weight of each class in the loss, (K,); None for equal weights.

    Args:
        class_weights: a weight for each class, `balanced`, or None.
        data: the data module; its `class_counts` is the number of training images of each class.
        num_classes: K.
        balanced: counts (K,), at least 1 → weights for `balanced`.
        label_numbers: for each class of the data, its number in the task; None if the order is the same.

    Raises:
        DataError: the number of weights is wrong, or `balanced` finds no class counts.
    """
    if class_weights is None:
        return None
    if class_weights == "balanced":
        counts = getattr(data, "class_counts", None)
        if counts is None:
            raise DataError(f"class_weights: balanced needs class_counts, which {type(data).__name__} does not have")
        counts_K = torch.as_tensor(counts, dtype=torch.float32).clamp_min(1)
        return balanced(counts_K if label_numbers is None else counts_K[torch.tensor(label_numbers).argsort()])
    if len(class_weights) != num_classes:
        raise DataError(f"class_weights has {len(class_weights)} weights for {num_classes} classes")
    return torch.as_tensor(class_weights, dtype=torch.float32)
