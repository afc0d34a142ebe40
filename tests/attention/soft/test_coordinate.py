"""Test the gates along rows and columns against slow loops from their papers' equations."""

import itertools

import pytest
import torch

from tests.attention.mechanisms import image, normalised, seeded, sigmoid, weights
from visionattn.attention import ELA, CoordinateAttention, SimpleCoordinateAttention, StripAttention


def hardswish(value):
    return value * (value + 3).clamp(0, 6) / 6


def test_coordinate_attention_matches_its_equation():
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


def silu(value):
    return value * torch.sigmoid(value)


def test_simple_coordinate_attention_matches_its_equation():
    module = seeded(SimpleCoordinateAttention, 6)
    x = image(2, 6, 3, 5)
    w = weights(module)
    out = torch.empty_like(x)

    def hidden(z_C):
        return silu(w["fc1.weight"] @ z_C + w["fc1.bias"])

    for b, i, j in itertools.product(range(2), range(3), range(5)):
        logits = w["fc_h.weight"] @ hidden(x[b, :, i].mean(1)) + w["fc_h.bias"]
        logits = logits + w["fc_w.weight"] @ hidden(x[b, :, :, j].mean(1)) + w["fc_w.bias"]
        out[b, :, i, j] = x[b, :, i, j] * torch.sigmoid(logits)
    torch.testing.assert_close(module(x), out)


def convolved(line, kernel):
    """Compute a one-dimensional convolution of a list with zero padding."""
    half = len(kernel) // 2
    return [
        sum(float(kernel[k] * line[i + k - half]) for k in range(len(kernel)) if 0 <= i + k - half < len(line))
        for i in range(len(line))
    ]


def test_ela_matches_its_equation():
    module = seeded(ELA, 4, kernel_size=3)
    x = image(2, 4, 5, 3)
    w = weights(module)
    out = torch.empty_like(x)
    for b in range(2):
        gates = {}
        for axis, means in (("h", x[b].mean(2)), ("w", x[b].mean(1))):
            kernels = w[f"conv_{axis}.weight"].flatten(1)
            values = torch.tensor([convolved(means[c], kernels[c]) for c in range(4)], dtype=torch.float64)
            values = (values - values.mean()) / (values.var(correction=0) + 1e-5).sqrt()
            values = values * w[f"norm_{axis}.weight"][:, None] + w[f"norm_{axis}.bias"][:, None]
            gates[axis] = torch.sigmoid(silu(values))
        for c, i, j in itertools.product(range(4), range(5), range(3)):
            out[b, c, i, j] = x[b, c, i, j] * gates["h"][c, i] * gates["w"][c, j]
    torch.testing.assert_close(module(x), out)


def test_strip_attention_matches_its_equation():
    module = seeded(StripAttention, 4)
    x = image(2, 4, 5, 3)
    w = weights(module)
    out = torch.empty_like(x)
    for b, c in itertools.product(range(2), range(4)):
        rows = convolved(x[b, c].mean(1), w["conv_h.weight"][c].flatten())
        columns = convolved(x[b, c].mean(0), w["conv_w.weight"][c].flatten())
        for i, j in itertools.product(range(5), range(3)):
            out[b, c, i, j] = x[b, c, i, j] * sigmoid(rows[i] + columns[j])
    torch.testing.assert_close(module(x), out)


@pytest.mark.parametrize("mechanism", [ELA, StripAttention])
def test_even_kernel_raises(mechanism):
    with pytest.raises(ValueError, match="kernel_size must be odd, so that the gate has the input's size, got 4"):
        mechanism(8, kernel_size=4)
