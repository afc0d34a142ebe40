"""Test block attention against a loop over queries, and the gradient of a bias against torch."""

import torch

from visionattn.attention.self_attention.block_attention import attend, attend_in_blocks, cut


def reach_of(size, distance):
    """Return for every row the range of rows at most `distance` away."""
    return [(max(0, i - distance), min(size, i + distance + 1)) for i in range(size)]


def test_block_attention_matches_a_loop_over_queries():
    torch.manual_seed(0)
    rows, columns = reach_of(5, 1), reach_of(7, 2)
    q, k, v = torch.randn(3, 2, 5, 7, 2, 4, dtype=torch.float64)
    prefix_k, prefix_v = torch.randn(2, 2, 2, 1, 4, dtype=torch.float64)

    def bias(row, column):
        both = row.allowed(q.device)[:, None, :, None] & column.allowed(q.device)[None, :, None]
        return both.flatten(2).flatten(0, 1)

    out = attend_in_blocks([q, k, v], [prefix_k, prefix_v], (cut(rows, 2), cut(columns, 3)), bias, 0.0)
    for b, i, j, h in torch.cartesian_prod(*(torch.arange(size) for size in (2, 5, 7, 2))).tolist():
        reached = b, slice(*rows[i]), slice(*columns[j]), h
        keys = torch.cat([prefix_k[b, h], k[reached].flatten(0, 1)])
        values = torch.cat([prefix_v[b, h], v[reached].flatten(0, 1)])
        expected = torch.softmax(keys @ q[b, i, j, h] / 2, 0) @ values
        torch.testing.assert_close(out[b, i, j, h], expected)


def test_every_row_is_in_one_block_with_all_rows_it_reaches():
    reach = reach_of(23, 3)
    reached = {}  # row of queries: the ranges of keys in the blocks that contain the row
    for run in cut(reach, 4):
        for number in range(run.count):
            start = run.start + number * run.block
            for row in range(run.block):
                low, high = run.reach[row]
                reached.setdefault(start + run.offset + row, []).append((start + low, start + high))
                assert high <= run.extent
    assert reached == {row: [keys] for row, keys in enumerate(reach)}


def test_gradient_of_a_bias_matches_torch():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 3, 2, 5, 4, dtype=torch.float64).requires_grad_()
    bias = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)
    expected = torch.softmax(q @ k.mT / 2 + bias, -1) @ v
    weights = torch.randn_like(expected)
    found = attend(q, k, v, bias, 0.0)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad((found * weights).sum(), bias)
    (expected_gradient,) = torch.autograd.grad((expected * weights).sum(), bias)
    torch.testing.assert_close(gradient, expected_gradient)
