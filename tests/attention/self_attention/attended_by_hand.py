"""References for the forms of self-attention: the pairs of patches that each form allows, and the attention over them.

Patches i and j are pairs (row, column). The factor m of a pair is 1 if the pair is allowed and 0 if not; the ramp of an
adaptive span also has values between 0 and 1.
"""

import math
from functools import partial

import torch

from visionattn import attention

SPANS = (0.3, 3.2)


def windowed(i, j, grid, window, shift):
    """Return whether patches i and j are in the same window."""
    return all(math.floor((a - shift) / window) == math.floor((b - shift) / window) for a, b in zip(i, j, strict=True))


def neighbourhood(i, j, grid, size, dilation=1, stride=1):
    """Return whether patch j is in the neighbourhood of patch i, which moves inwards at the edges.

    Rows are sorted into groups by their residue; `group` holds the rows of i's residue.
    """
    for a, b, extent in zip(i, j, grid, strict=True):
        group = [row for row in range(extent) if row % dilation == a % dilation]
        if b not in group:
            return False
        place, k = group.index(a), min(size, len(group))
        strides = [range(first, first + stride) for first in range(0, len(group), stride)]
        own = next(own for own in strides if place in own)
        leader = min(own[stride // 2], len(group) - 1)
        start = max(0, min(leader - k // 2, len(group) - k))
        if b not in group[start : start + k]:
            return False
    return True


def cross(i, j, grid):
    """Return whether patch j is in the row or the column of patch i."""
    return i[0] == j[0] or i[1] == j[1]


def adaptive_span(i, j, grid, z, ramp):
    """Return m of the paper's ramp, in [0, 1]."""
    distance = max(abs(i[0] - j[0]), abs(i[1] - j[1]))
    return min(max((ramp + z - distance) / ramp, 0), 1)


def allowed_cross(row_i, column_i, row_j, column_j):
    """Return the same as `cross`, for tensors."""
    return (row_i == row_j) | (column_i == column_j)


def adaptive_span_with_two_spans(num_heads):
    """Make an AdaptiveSpan whose even and odd heads have different spans."""
    module = attention.AdaptiveSpan(num_heads, max_span=4, ramp=1.5)
    with torch.no_grad():
        module.span.copy_(torch.tensor([SPANS[head % 2] / 4 for head in range(num_heads)]))
    return module


MASKED = {  # name: (factory of the mechanism, m as a function of head, i, j and grid)
    "windowed": (partial(attention.Windowed, window=3), lambda head, i, j, grid: windowed(i, j, grid, 3, 0)),
    "windowed, shifted": (
        partial(attention.Windowed, window=4, shift=3),
        lambda head, i, j, grid: windowed(i, j, grid, 4, 3),
    ),
    "neighbourhood": (partial(attention.Neighbourhood, size=5), lambda head, i, j, grid: neighbourhood(i, j, grid, 5)),
    "neighbourhood, dilated": (
        partial(attention.Neighbourhood, size=3, dilation=2),
        lambda head, i, j, grid: neighbourhood(i, j, grid, 3, dilation=2),
    ),
    "neighbourhood, strided": (
        partial(attention.Neighbourhood, size=4, stride=3),
        lambda head, i, j, grid: neighbourhood(i, j, grid, 4, stride=3),
    ),
    "neighbourhood, dilated and strided": (
        partial(attention.Neighbourhood, size=2, dilation=3, stride=2),
        lambda head, i, j, grid: neighbourhood(i, j, grid, 2, dilation=3, stride=2),
    ),
    "block-sparse": (
        partial(attention.BlockSparse, allowed=allowed_cross, block=4),
        lambda head, i, j, grid: cross(i, j, grid),
    ),
    "adaptive span": (
        adaptive_span_with_two_spans,
        lambda head, i, j, grid: adaptive_span(i, j, grid, SPANS[head % 2], 1.5),
    ),
}


def weights_by_hand(m, heads, grid, prefix):
    """Return m of every head and pair of tokens, (H, N, N) float64.

    m is 1 for allowed pairs and for pairs with a prefix token, 0 for masked pairs, and between on the ramp of a span.
    """
    patches = [(row, column) for row in range(grid[0]) for column in range(grid[1])]
    out = torch.ones(heads, prefix + len(patches), prefix + len(patches), dtype=torch.float64)
    for head in range(heads):
        for a, i in enumerate(patches):
            for b, j in enumerate(patches):
                out[head, prefix + a, prefix + b] = float(m(head, i, j, grid))
    return out


def attended(q, k, v, m_HNN):
    """Return Σ_j m exp(s) v / Σ_j m exp(s) and the weights m exp(s) / Σ_j m exp(s), in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = (q @ k.mT * q.shape[-1] ** -0.5).exp() * m_HNN
    weights = scores / scores.sum(-1, keepdim=True)
    return weights @ v, weights
