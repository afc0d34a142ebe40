"""Test deformable attention against equation 3 of its paper, in a loop over queries, heads, maps and points."""

import math

import pytest
import torch

from visionattn.attention.self_attention.deformable import DeformableAttention


def bilinear(map_chw, x, y):
    """Interpolate a map at (x, y), in units of cells from the map's top-left corner; cells outside the map are 0."""
    x, y = x - 0.5, y - 0.5
    out = torch.zeros(map_chw.shape[0], dtype=map_chw.dtype)
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < map_chw.shape[1] and 0 <= column < map_chw.shape[2]:
                out += (1 - abs(x - column)) * (1 - abs(y - row)) * map_chw[:, row, column]
    return out


def by_the_equation(attention, queries, boxes, maps):
    """Compute equation 3 of the paper in loops."""
    heads, levels, points = attention.heads, attention.levels, attention.points
    head_dim = queries.shape[2] // heads
    out = torch.zeros_like(queries)
    for b in range(queries.shape[0]):
        values = [attention.value(x[b : b + 1])[0] for x in maps]
        for q in range(queries.shape[1]):
            cx, cy, w, h = boxes[b, q].tolist()
            offsets = attention.offsets(queries[b, q]).view(heads, levels, points, 2)
            weights = attention.weigh(queries[b, q]).view(heads, levels * points).softmax(-1)
            outputs = []  # one for each head
            for m in range(heads):
                head = torch.zeros(head_dim, dtype=queries.dtype)
                for level in range(levels):
                    value = values[level][m * head_dim : (m + 1) * head_dim]
                    for k in range(points):
                        x = cx + float(offsets[m, level, k, 0]) * w / (2 * points)
                        y = cy + float(offsets[m, level, k, 1]) * h / (2 * points)
                        point = x * value.shape[2], y * value.shape[1]
                        head += weights[m, level * points + k] * bilinear(value, *point)
                outputs.append(head)
            out[b, q] = attention.project(torch.cat(outputs))
    return out


@pytest.mark.parametrize(("heads", "points", "levels"), [(1, 1, 1), (4, 3, 2), (2, 2, 3)])
def test_deformable_attention_matches_its_equation(heads, points, levels):
    torch.manual_seed(0)
    attention = DeformableAttention(8, levels=levels, heads=heads, points=points).double()
    torch.nn.init.normal_(attention.offsets.weight)
    torch.nn.init.normal_(attention.weigh.weight)
    queries, boxes = torch.randn(2, 5, 8).double(), torch.rand(2, 5, 4).double()
    maps = [torch.randn(2, 8, 7 // (level + 1) + 1, 9 // (level + 1) + 1).double() for level in range(levels)]
    with torch.no_grad():
        torch.testing.assert_close(attention(queries, boxes, maps), by_the_equation(attention, queries, boxes, maps))


def test_map_that_extends_beyond_the_image_is_sampled_at_image_coordinates():
    """Each map contains the pixel coordinates of its cells in a 44 × 60 image, so sampling returns coordinates."""
    attention = DeformableAttention(8, levels=3, heads=1, points=1).requires_grad_(False)
    attention.offsets.bias.zero_()
    attention.value.weight.copy_(torch.eye(8)[:, :, None, None])
    attention.project.weight.copy_(torch.eye(8))
    for bias in (attention.value.bias, attention.project.bias):
        bias.zero_()
    maps, spans = [], []
    for stride in (4, 8, 16):
        rows, columns = -(-44 // stride), -(-60 // stride)
        maps.append(torch.zeros(1, 8, rows, columns))
        maps[-1][0, 0] = (torch.arange(columns) + 0.5) * stride
        maps[-1][0, 1] = ((torch.arange(rows) + 0.5) * stride)[:, None]
        spans.append([columns * stride / 60, rows * stride / 44])
    boxes = torch.tensor([[[0.5, 0.5, 0.1, 0.1], [0.7, 0.75, 0.1, 0.1]]])
    found = attention(torch.zeros(1, 2, 8), boxes, maps, torch.tensor(spans))
    torch.testing.assert_close(found[0, :, :2], boxes[0, :, :2] * torch.tensor([60.0, 44.0]))


def test_initial_points_surround_the_box_with_equal_weights():
    attention = DeformableAttention(8, levels=1, heads=4, points=2)
    samplings = []
    attention.sampling.register_forward_hook(lambda _, args, out: samplings.append(out))
    attention(torch.randn(1, 1, 8), torch.tensor([[[0.5, 0.5, 0.4, 0.2]]]), [torch.randn(1, 8, 4, 4)])
    ((points, weights),) = samplings
    torch.testing.assert_close(weights, torch.full_like(weights, 0.5))
    edges = points[0, 0, :, 0, 1]  # the last point of each head is on the box's edge
    torch.testing.assert_close(edges, torch.tensor([[0.7, 0.5], [0.5, 0.6], [0.3, 0.5], [0.5, 0.4]]))
