"""Normalisers: functions and modules that turn scores into weights that sum to one.

Shapes: B batch, K maps, H rows, W columns; N the axis that is normalised.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sparsemax(scores: Tensor, dim: int = -1) -> Tensor:
    """Project scores to the nearest point of the simplex; most weights are 0 (Martins & Astudillo 2016, 1602.02068).

        p = max(s − tau, 0),    tau such that p sums to one                     (alg. 1)

    Gradients are exact (prop. 2): the sort only selects the scores with weights above 0, and tau is computed from the
    selected scores. The result has the shape and dtype of `scores`.
    """
    z = _exact(scores)
    z = z - z.amax(dim, keepdim=True).detach()  # sums of large scores would round away small differences
    with torch.no_grad():
        sorted_, rank = _sorted(z, dim)
        inside = 1 + rank * sorted_ > sorted_.cumsum(dim)
        lowest = _lowest(sorted_, inside, dim)
    support = z >= lowest
    tau = (torch.where(support, z, 0).sum(dim, keepdim=True) - 1) / support.sum(dim, keepdim=True)
    return (z - tau).clamp(min=0).to(scores.dtype)


def entmax15(scores: Tensor, dim: int = -1) -> Tensor:
    """Compute 1.5-entmax, between softmax and sparsemax (Peters et al. 2019, 1905.05702, alg. 2).

        p = max(s / 2 − tau, 0)^2,    tau such that p sums to one

    Gradients are exact: the sort only selects the scores with weights above 0, and tau is computed from the selected
    scores. The result has the shape and dtype of `scores`.
    """
    z = _exact(scores) / 2
    z = z - z.amax(dim, keepdim=True).detach()  # otherwise the squares of large scores lose precision
    with torch.no_grad():
        sorted_, rank = _sorted(z, dim)
        inside = _threshold(sorted_.cumsum(dim) / rank, sorted_.square().cumsum(dim) / rank, rank) <= sorted_
        lowest = _lowest(sorted_, inside, dim)
    support = z >= lowest
    count = support.sum(dim, keepdim=True)
    kept = torch.where(support, z, 0)
    tau = _threshold(kept.sum(dim, keepdim=True) / count, kept.square().sum(dim, keepdim=True) / count, count)
    return (z - tau).clamp(min=0).square().to(scores.dtype)


def _exact(scores: Tensor) -> Tensor:
    return scores.to(torch.promote_types(scores.dtype, torch.float32))


def _sorted(z: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    rank = torch.arange(1, z.shape[dim] + 1, device=z.device, dtype=z.dtype)
    shape = [1] * z.ndim
    shape[dim] = -1
    return z.sort(dim, descending=True).values, rank.view(shape)


def _lowest(sorted_: Tensor, inside: Tensor, dim: int) -> Tensor:
    """Return the lowest score whose weight is above 0."""
    return torch.where(inside, sorted_, math.inf).amin(dim, keepdim=True)


def _threshold(mean: Tensor, mean_square: Tensor, count: Tensor) -> Tensor:
    """Return tau from the mean, mean square and number of the scores whose weights are above 0."""
    return mean - (1 / count - mean_square + mean.square()).clamp(min=0).sqrt()


class Softmax(nn.Module):
    """p = softmax(s / temperature) over the positions of each map.

    Args:
        temperature: > 0; larger values give flatter weights (default: 1).

    Raises:
        ValueError: temperature is not > 0.

    Shape: scores (B, K, H, W) → weights, the same.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"temperature must be > 0, got {temperature}")
        self.temperature = temperature

    def forward(self, scores_BKHW: Tensor) -> Tensor:
        return F.softmax(scores_BKHW.flatten(2) / self.temperature, -1).view_as(scores_BKHW)


class Sparsemax(nn.Module):
    """`sparsemax` over the positions of each map.

    Shape: scores (B, K, H, W) → weights, the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = _OverPositions(sparsemax)

    def forward(self, scores_BKHW: Tensor) -> Tensor:
        return self.gate(scores_BKHW)


class Entmax15(nn.Module):
    """`entmax15` over the positions of each map.

    Shape: scores (B, K, H, W) → weights, the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = _OverPositions(entmax15)

    def forward(self, scores_BKHW: Tensor) -> Tensor:
        return self.gate(scores_BKHW)


class NormalisedSigmoid(nn.Module):
    """p = sigmoid(s) / sum over positions of sigmoid(s): many positions can have equally large weights.

    Shape: scores (B, K, H, W) → weights, the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self.gate = _OverPositions(_normalised_sigmoid)

    def forward(self, scores_BKHW: Tensor) -> Tensor:
        return self.gate(scores_BKHW)


class _OverPositions(nn.Module):
    def __init__(self, normalise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.normalise = normalise

    def forward(self, scores_BKHW: Tensor) -> Tensor:
        return self.normalise(scores_BKHW.flatten(2)).view_as(scores_BKHW)


def _normalised_sigmoid(scores: Tensor) -> Tensor:
    log = F.logsigmoid(_exact(scores))
    relative = (log - log.amax(-1, keepdim=True)).exp()  # without this shift, very low scores would all give 0
    return (relative / relative.sum(-1, keepdim=True)).to(scores.dtype)
