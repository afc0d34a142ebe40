"""The allowed pairs of each form of self-attention, pair by pair, and attention with such weights."""

import math
from functools import partial

import torch

from visionattn import attention

SPANS = (0.3, 3.2)


def windowed(i, j, grid, window, shift):
    return all(math.floor((a - shift) / window) == math.floor((b - shift) / window) for a, b in zip(i, j, strict=True))


def neighbourhood(i, j, grid, size):
    for a, b, extent in zip(i, j, grid, strict=True):
        k = min(size, extent)
        start = max(0, min(a - size // 2, extent - k))
        if not start <= b < start + k:
            return False
    return True


def cross(i, j, grid):
    """Allow the query's own row and own column."""
    return i[0] == j[0] or i[1] == j[1]


def adaptive_span(i, j, grid, z, ramp):
    distance = max(abs(i[0] - j[0]), abs(i[1] - j[1]))
    return min(max((ramp + z - distance) / ramp, 0), 1)


def allowed_cross(row_i, column_i, row_j, column_j):
    return (row_i == row_j) | (column_i == column_j)


def spanned(num_heads):
    """Make two heads with different spans."""
    module = attention.AdaptiveSpan(num_heads, max_span=4, ramp=1.5)
    with torch.no_grad():
        module.span.copy_(torch.tensor([SPANS[head % 2] / 4 for head in range(num_heads)]))
    return module


MASKED = {  # a factory of the mechanism, and m of a head and a pair of patches
    "windowed": (partial(attention.Windowed, window=3), lambda head, i, j, grid: windowed(i, j, grid, 3, 0)),
    "windowed, shifted": (
        partial(attention.Windowed, window=4, shift=3),
        lambda head, i, j, grid: windowed(i, j, grid, 4, 3),
    ),
    "neighbourhood": (partial(attention.Neighbourhood, size=5), lambda head, i, j, grid: neighbourhood(i, j, grid, 5)),
    "block-sparse": (
        partial(attention.BlockSparse, allowed=allowed_cross, block=4),
        lambda head, i, j, grid: cross(i, j, grid),
    ),
    "adaptive span": (spanned, lambda head, i, j, grid: adaptive_span(i, j, grid, SPANS[head % 2], 1.5)),
}


def weights_by_hand(m, heads, grid, prefix):
    """Return m of every head and pair of tokens, (H, N, N) float64; 1 for every pair with a prefix token."""
    patches = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    out = torch.ones(heads, prefix + len(patches), prefix + len(patches), dtype=torch.float64)
    for head in range(heads):
        for a, i in enumerate(patches):
            for b, j in enumerate(patches):
                out[head, prefix + a, prefix + b] = float(m(head, i, j, grid))
    return out


def attended(q, k, v, m_HNN):
    """Return Σ_j m exp(s) v / Σ_j m exp(s) in float64, and the weights."""
    q, k, v = q.double(), k.double(), v.double()
    scores = (q @ k.mT * q.shape[-1] ** -0.5).exp() * m_HNN
    weights = scores / scores.sum(-1, keepdim=True)
    return weights @ v, weights
