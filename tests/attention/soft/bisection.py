"""Reference for sparsemax and 1.5-entmax, by bisection."""

import torch


def by_bisection(scores, power):
    """Return p = max(s / power − tau, 0) ** power for a list of scores; tau is found by halving an interval."""
    z = [float(score) / power for score in scores]
    low, high = max(z) - 1, max(z)
    for _ in range(200):
        middle = (low + high) / 2
        if sum(max(value - middle, 0) ** power for value in z) > 1:
            low = middle
        else:
            high = middle
    return torch.tensor([max(value - low, 0) ** power for value in z], dtype=torch.float64)
