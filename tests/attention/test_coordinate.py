"""Gates along rows and columns against slow loops from their papers' equations."""

import itertools

import torch

from tests.attention.mechanisms import image, normalised, seeded, sigmoid, weights
from visionattn.attention import CoordinateAttention


def hardswish(value):
    return value * (value + 3).clamp(0, 6) / 6


def test_coordinate_attention_is_its_equation():
    module = seeded(CoordinateAttention, 6)
    x = image(2, 6, 3, 5)
    w = weights(module)
    squeeze, to_rows, to_columns = (w[f"{name}.weight"][:, :, 0, 0] for name in ("conv1", "conv_h", "conv_w"))
    out = torch.empty_like(x)

    def hidden(z_C):
        return hardswish(normalised(squeeze @ z_C, w, "bn1"))

    for b in range(2):
        rows = [to_rows @ hidden(sum(x[b, :, i, j] for j in range(5)) / 5) for i in range(3)]
        columns = [to_columns @ hidden(sum(x[b, :, i, j] for i in range(3)) / 3) for j in range(5)]
        for c, i, j in itertools.product(range(6), range(3), range(5)):
            out[b, c, i, j] = x[b, c, i, j] * sigmoid(float(rows[i][c])) * sigmoid(float(columns[j][c]))
    torch.testing.assert_close(module(x), out)
