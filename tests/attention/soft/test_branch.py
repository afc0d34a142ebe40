"""Test the convolutions with several branches against slow loops from the papers' equations."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from tests.attention.mechanisms import image, normalised, seeded, weights
from visionattn.attention import SelectiveKernel, SplitAttention
from visionattn.capture import NoWeights, capture


def convolved(x_CHW, weight, dilation):
    """Compute a 3 × 3 convolution with zero padding, position by position."""
    padded = F.pad(x_CHW, (dilation,) * 4)
    height, width = x_CHW.shape[1:]
    taps = slice(None, 2 * dilation + 1, dilation)  # the three rows or columns under the kernel
    out = torch.empty(len(weight), height, width, dtype=x_CHW.dtype)
    for o, i, j in itertools.product(range(len(weight)), range(height), range(width)):
        out[o, i, j] = (padded[:, i:, j:][:, taps, taps] * weight[o]).sum()
    return out


def vectors_for_maps(w):
    """Return the weights with one value per channel, shaped for (C, H, W)."""
    return {name: value[:, None, None] for name, value in w.items() if value.ndim == 1}


def vectors(w):
    """Return the weights with one value per channel, (C,)."""
    return {name: value for name, value in w.items() if value.ndim == 1}


def captured_gate(module, x):
    """Return the channel gate that `capture` records, (B, C)."""
    with torch.no_grad(), capture(module, NoWeights()) as records:
        module(x)
    (record,) = records
    assert record.kind == "channel_gate"
    return record.weights.double()[:, :, 0, 0]


def test_selective_kernel_matches_its_equation_and_is_captured():
    module = seeded(SelectiveKernel, 3)
    x = image(2, 3, 4, 5)
    w = weights(module)
    out, gates = torch.empty_like(x), torch.empty(2, 6, dtype=torch.float64)
    for b in range(2):
        branches = [
            torch.relu(
                normalised(convolved(x[b], w[f"paths.{p}.conv.weight"], p + 1), vectors_for_maps(w), f"paths.{p}.bn")
            )
            for p in range(2)
        ]
        z = w["gate.attention.fc_reduce.weight"][:, :, 0, 0] @ sum(branches).mean((1, 2))
        z = torch.relu(normalised(z, vectors(w), "gate.attention.bn"))
        exponentials = (w["gate.attention.fc_select.weight"][:, :, 0, 0] @ z).exp().view(2, 3)
        branch_weights = exponentials / exponentials.sum(0)
        gates[b] = branch_weights.flatten()
        out[b] = sum(branch_weights[p][:, None, None] * branches[p] for p in range(2))
    torch.testing.assert_close(module(x), out)
    torch.testing.assert_close(captured_gate(module, x), gates, atol=1e-6, rtol=1e-5)


def test_split_attention_matches_its_equation_and_is_captured():
    module = seeded(SplitAttention, 4)
    x = image(2, 4, 4, 5)
    w = weights(module)
    out, gates = torch.empty_like(x), torch.empty(2, 8, dtype=torch.float64)
    for b in range(2):
        halves = [convolved(x[b, 2 * p : 2 * p + 2], w["conv.weight"][4 * p : 4 * p + 4], 1) for p in range(2)]
        branches = torch.relu(normalised(torch.cat(halves), vectors_for_maps(w), "bn0")).view(2, 4, 4, 5)
        z = w["fc1.weight"][:, :, 0, 0] @ branches.sum(0).mean((1, 2)) + w["fc1.bias"]
        z = torch.relu(normalised(z, vectors(w), "bn1"))
        exponentials = (w["fc2.weight"][:, :, 0, 0] @ z + w["fc2.bias"]).exp().view(2, 4)
        branch_weights = exponentials / exponentials.sum(0)
        gates[b] = branch_weights.flatten()
        out[b] = sum(branch_weights[p][:, None, None] * branches[p] for p in range(2))
    torch.testing.assert_close(module(x), out)
    torch.testing.assert_close(captured_gate(module, x), gates, atol=1e-6, rtol=1e-5)


def test_radix_that_does_not_divide_channels_raises():
    with pytest.raises(ValueError, match="channels that are a multiple of radix, got radix=3 and 8 channels"):
        SplitAttention(8, radix=3)
