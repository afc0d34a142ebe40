"""Test the gates over channels and positions against slow loops from their papers' equations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tests.attention.mechanisms import image, normalised, seeded, sigmoid, weights
from tests.refusals import refuses
from visionattn.attention import BAM, CBAM, EMA, LightCBAM, SimAM, TripletAttention


def test_cbam_matches_its_equation():
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


def test_light_cbam_matches_its_equation():
    module = seeded(LightCBAM, 4, reduction=2, kernel_size=3)
    x = image(2, 4, 5, 3)
    w = weights(module)
    out = torch.empty_like(x)
    for b in range(2):
        z = (x[b].flatten(1).mean(1) + x[b].flatten(1).max(1).values) / 2
        logits = w["channel.fc2.weight"][:, :, 0, 0] @ torch.relu(w["channel.fc1.weight"][:, :, 0, 0] @ z)
        gated = x[b] * torch.sigmoid(logits)[:, None, None]
        plane = F.pad((gated.mean(0) + gated.max(0).values) / 2, (1, 1, 1, 1))
        for i, j in itertools.product(range(5), range(3)):
            value = (plane[i : i + 3, j : j + 3] * w["spatial.conv.conv.weight"][0, 0]).sum()
            out[b, :, i, j] = gated[:, i, j] * torch.sigmoid(normalised(value, w, "spatial.conv.bn"))
    torch.testing.assert_close(module(x), out)


def test_bam_matches_its_equation():
    module = seeded(BAM, 4, reduction=2, dilation=2)
    x = image(2, 4, 5, 6)
    w = weights(module)

    def convolved(planes, name):
        """Compute a 1 × 1 convolution, or a 3 × 3 one of dilation 2, position by position."""
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        size = weight.shape[-1]
        found = torch.empty(len(weight), 5, 6, dtype=torch.float64)
        for o, i, j in itertools.product(range(len(weight)), range(5), range(6)):
            total = float(bias[o])
            for di, dj in itertools.product(range(size), range(size)):
                row, column = i + 2 * (di - size // 2), j + 2 * (dj - size // 2)
                if 0 <= row < 5 and 0 <= column < 6:
                    total += float(weight[o, :, di, dj] @ planes[:, row, column])
            found[o, i, j] = total
        return found

    def hidden(planes, name):
        per_channel = {key: value[:, None, None] for key, value in w.items() if value.ndim == 1}
        return torch.relu(normalised(planes, per_channel, name))

    for b in range(2):
        mean = x[b].mean((1, 2))[:, None, None].expand(-1, 5, 6)
        channel = convolved(hidden(convolved(mean, "channel.0"), "channel.1"), "channel.3")
        spatial = x[b]
        for convolution, norm in ((0, 1), (3, 4), (6, 7)):
            spatial = hidden(convolved(spatial, f"spatial.{convolution}"), f"spatial.{norm}")
        spatial = convolved(spatial, "spatial.9")
        expected = x[b] + x[b] * torch.sigmoid(channel + spatial)
        torch.testing.assert_close(module(x)[b], expected)


@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 7, 5, 9), (3, 4, 6, 6)])
def test_simam_matches_its_equation(shape):
    x = image(*shape)
    out = torch.empty_like(x)
    count = shape[2] * shape[3]
    for b, c in itertools.product(range(shape[0]), range(shape[1])):
        values = [float(value) for value in x[b, c].flatten()]
        mean = sum(values) / count
        var = sum((value - mean) ** 2 for value in values) / (count - 1)
        for position, value in enumerate(values):
            energy = 4 * (var + 1e-4) / ((value - mean) ** 2 + 2 * var + 2e-4)  # e in the paper's form, eq. 5
            out[b, c].view(-1)[position] = value * sigmoid(1 / energy)
    torch.testing.assert_close(SimAM(shape[1])(x), out)


def test_simam_treats_a_single_position_as_equal_to_the_mean():
    x = image(2, 3, 1, 1)
    torch.testing.assert_close(SimAM(3)(x), x / (1 + math.exp(-0.5)))


def test_triplet_attention_matches_its_equation():
    module = seeded(TripletAttention, 4, kernel_size=3)
    x = image(2, 4, 5, 6)
    w = weights(module)
    out = torch.zeros_like(x)
    for b in range(2):
        for axis, branch in enumerate(("over_channels", "over_rows", "over_columns")):
            rotated = x[b].movedim(axis, 0)  # as in the paper, which pools the first axis
            planes = F.pad(torch.stack([rotated.max(0).values, rotated.mean(0)]), (1, 1, 1, 1))
            result = torch.empty_like(rotated)
            for i, j in itertools.product(*map(range, rotated.shape[1:])):
                value = (planes[:, i : i + 3, j : j + 3] * w[f"gate.{branch}.0.weight"][0]).sum()
                result[:, i, j] = rotated[:, i, j] * sigmoid(float(normalised(value, w, f"gate.{branch}.1")))
            out[b] += result.movedim(0, axis) / 3
    torch.testing.assert_close(module(x), out)


def test_ema_matches_its_equation():
    module = seeded(EMA, 6, groups=2)
    x = image(2, 6, 4, 5)
    w = weights(module)
    along, along_bias = w["gate.along.weight"][:, :, 0, 0], w["gate.along.bias"]
    out = torch.empty_like(x)
    for b, group in itertools.product(range(2), range(2)):
        u = x[b, 3 * group : 3 * group + 3]
        far, near = torch.empty_like(u), torch.zeros_like(u)
        padded = F.pad(u, (1, 1, 1, 1))
        for i, j in itertools.product(range(4), range(5)):
            row, column = along @ u[:, i].mean(1) + along_bias, along @ u[:, :, j].mean(1) + along_bias
            far[:, i, j] = u[:, i, j] * torch.sigmoid(row) * torch.sigmoid(column)
            for d in range(3):
                near[d, i, j] = (padded[:, i : i + 3, j : j + 3] * w["gate.near.weight"][d]).sum()
                near[d, i, j] += w["gate.near.bias"][d]
        for d in range(3):
            far[d] = (far[d] - far[d].mean()) / (far[d].var(correction=0) + 1e-5).sqrt()
            far[d] = far[d] * w["gate.norm.weight"][d] + w["gate.norm.bias"][d]
        of_far, of_near = (torch.softmax(plane.flatten(1).mean(1), 0) for plane in (far, near))
        for i, j in itertools.product(range(4), range(5)):
            logit = float(of_far @ near[:, i, j] + of_near @ far[:, i, j])
            out[b, 3 * group : 3 * group + 3, i, j] = u[:, i, j] * sigmoid(logit)
    torch.testing.assert_close(module(x), out)


def test_invalid_arguments_raise():
    for mechanism in (CBAM, LightCBAM, TripletAttention):
        with pytest.raises(ValueError, match="kernel_size must be odd, so that the gate has the input's size, got 4"):
            mechanism(8, kernel_size=4)
    refuses(ValueError, "8 channels are not a multiple of groups=3; pass a divisor", EMA, 8, groups=3)
    refuses(ValueError, "regularisation must be > 0, got 0", SimAM, 8, regularisation=0)
