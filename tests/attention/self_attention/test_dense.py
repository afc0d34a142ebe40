"""Test attention with pooled keys, and attention to the k best keys."""

import pytest
import torch

from tests.attention.self_attention.attended_by_hand import attended
from tests.attention.self_attention.forms import qkv
from visionattn import attention

close = torch.testing.assert_close


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(5, 7), (2, 1)])
def test_pooled_keys_are_means_over_cells(grid, prefix):
    q, k, v = qkv(grid, prefix)
    cells = [  # for each pooled cell, the indices of its tokens
        [row * grid[1] + column + prefix for row in range(*rows) for column in range(*columns)]
        for rows in ((top, min(top + 2, grid[0])) for top in range(0, grid[0], 2))
        for columns in ((left, min(left + 2, grid[1])) for left in range(0, grid[1], 2))
    ]
    cells = [[token] for token in range(prefix)] + cells  # prefix tokens are not pooled
    pooled = [torch.stack([x[:, :, tokens].mean(2) for tokens in cells], 2) for x in (k, v)]
    expected, _ = attended(q, *pooled, 1)
    out = attention.PooledKeys(2, pool=2)(q, k, v, grid=grid, num_prefix_tokens=prefix)
    close(out.double(), expected, atol=1e-5, rtol=0)
    for found, reference in zip(
        *(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (out, expected)), strict=True
    ):
        close(found, reference, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("k", "prefix"), [(4, 2), (1, 0), (99, 1)])
def test_top_k_keeps_the_k_largest_logits(k, prefix):
    grid = (3, 5)
    inputs = qkv(grid, prefix)
    m = torch.ones(2, 2, prefix + 15, prefix + 15)
    scores = inputs[0] @ inputs[1].mT
    for b in range(2):
        for h in range(2):
            for i in range(prefix, prefix + 15):
                row = scores[b, h, i, prefix:].tolist()
                for j, score in enumerate(row):
                    m[b, h, i, prefix + j] = score in sorted(row)[-k:]
    expected, _ = attended(*inputs, m.double())
    out = attention.TopK(2, k=k)(*inputs, grid=grid, num_prefix_tokens=prefix)
    close(out.double(), expected, atol=1e-5, rtol=0)
    for found, reference in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected)), strict=True):
        close(found, reference, atol=1e-4, rtol=0)
