"""Gates over channels and positions against slow loops from their papers' equations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.attention.mechanisms import image, normalised, seeded, sigmoid, weights
from visionattn.attention import CBAM, SimAM, TripletAttention


def test_cbam_is_its_equation():
    module = seeded(CBAM, 4, reduction=2, kernel_size=3)
    x = image(2, 4, 5, 3)
    w = weights(module)

    def mlp(z):
        return w["channel.fc2.weight"][:, :, 0, 0] @ torch.relu(w["channel.fc1.weight"][:, :, 0, 0] @ z)

    out = torch.empty_like(x)
    for b in range(2):
        gate_C = torch.sigmoid(mlp(x[b].flatten(1).mean(1)) + mlp(x[b].flatten(1).max(1).values))
        gated = x[b] * gate_C[:, None, None]
        planes = F.pad(torch.stack([gated.mean(0), gated.max(0).values]), (1, 1, 1, 1))
        for row, column in itertools.product(range(5), range(3)):
            value = (planes[:, row : row + 3, column : column + 3] * w["spatial.conv.conv.weight"][0]).sum()
            value = normalised(value, w, "spatial.conv.bn")
            out[b, :, row, column] = gated[:, row, column] * torch.sigmoid(value)
    torch.testing.assert_close(module(x), out)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 7, 5, 9), (3, 4, 6, 6)])
def test_simam_is_its_equation(shape):
    x = image(*shape)
    out = torch.empty_like(x)
    count = shape[2] * shape[3]
    for b, c in itertools.product(range(shape[0]), range(shape[1])):
        values = [float(value) for value in x[b, c].flatten()]
        mean = sum(values) / count
        var = sum((value - mean) ** 2 for value in values) / (count - 1)
        for place, value in enumerate(values):
            energy = 4 * (var + 1e-4) / ((value - mean) ** 2 + 2 * var + 2e-4)  # the paper's form of e
            out[b, c].view(-1)[place] = value * sigmoid(1 / energy)
    torch.testing.assert_close(SimAM(shape[1])(x), out)


def test_simam_of_a_single_position_is_halfway():
    x = image(2, 3, 1, 1)
    torch.testing.assert_close(SimAM(3)(x), x / (1 + math.exp(-0.5)))


def test_triplet_attention_is_its_equation():
    module = seeded(TripletAttention, 4, kernel_size=3)
    x = image(2, 4, 5, 6)
    w = weights(module)
    out = torch.zeros_like(x)
    for b in range(2):
        for axis, branch in enumerate(("over_channels", "over_rows", "over_columns")):
            turned = x[b].movedim(axis, 0)  # the paper rotates the tensor and pools its first axis
            planes = F.pad(torch.stack([turned.max(0).values, turned.mean(0)]), (1, 1, 1, 1))
            result = torch.empty_like(turned)
            for i, j in itertools.product(*map(range, turned.shape[1:])):
                value = (planes[:, i : i + 3, j : j + 3] * w[f"gate.{branch}.0.weight"][0]).sum()
                result[:, i, j] = turned[:, i, j] * sigmoid(float(normalised(value, w, f"gate.{branch}.1")))
            out[b] += result.movedim(0, axis) / 3
    torch.testing.assert_close(module(x), out)


def test_arguments_that_cannot_work_are_named():
    for mechanism in (CBAM, TripletAttention):
        with pytest.raises(ValueError, match="kernel_size must be odd so that the gate stays in place, got 4"):
            mechanism(8, kernel_size=4)
    with pytest.raises(ValueError, match="regularisation must be > 0, got 0"):
        SimAM(8, regularisation=0)
