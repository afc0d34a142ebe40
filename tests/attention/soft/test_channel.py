"""Test the gates over channels against slow loops from their papers' equations."""

import itertools
import math

import pytest
import torch

from tests.attention.mechanisms import image, seeded, sigmoid, weights
from tests.refusals import refuses
from visionattn.attention import ECA, GCT, SE, CircularECA, EffectiveSE, FcaNet, WideECA


def test_se_matches_its_equation():
    module = seeded(SE, 6, reduction=3)
    x = image(2, 6, 3, 5)
    w = weights(module)
    out = torch.empty_like(x)
    for b in range(2):
        z = [x[b, c].sum() / 15 for c in range(6)]
        hidden = [
            max(0.0, float(sum(w["fc1.weight"][h, c, 0, 0] * z[c] for c in range(6)) + w["fc1.bias"][h]))
            for h in range(2)
        ]
        for c in range(6):
            logit = float(sum(w["fc2.weight"][c, h, 0, 0] * hidden[h] for h in range(2)) + w["fc2.bias"][c])
            out[b, c] = x[b, c] * sigmoid(logit)
    torch.testing.assert_close(module(x), out)


@pytest.mark.parametrize(("channels", "kernel"), [(8, 3), (64, 3), (256, 5), (7, 3)])
def test_eca_matches_its_equation(channels, kernel):
    module = seeded(ECA, channels)
    x = image(2, channels, 2, 3)
    weight = weights(module)["conv.weight"][0, 0]
    assert len(weight) == kernel
    out = torch.empty_like(x)
    for b, c in itertools.product(range(2), range(channels)):
        logit = 0.0
        for k in range(kernel):
            neighbour = c + k - kernel // 2
            if 0 <= neighbour < channels:
                logit += float(weight[k] * x[b, neighbour].mean())
        out[b, c] = x[b, c] * sigmoid(logit)
    torch.testing.assert_close(module(x), out)


def test_effective_se_matches_its_equation():
    module = seeded(EffectiveSE, 5)
    x = image(2, 5, 3, 2)
    w = weights(module)
    out = torch.empty_like(x)
    for b, c in itertools.product(range(2), range(5)):
        logit = sum(float(w["fc.weight"][c, d, 0, 0] * x[b, d].mean()) for d in range(5)) + float(w["fc.bias"][c])
        out[b, c] = x[b, c] * min(1.0, max(0.0, logit / 6 + 0.5))
    torch.testing.assert_close(module(x), out)


def test_circular_eca_wraps_around_the_channels():
    module = seeded(CircularECA, 7)
    x = image(2, 7, 2, 3)
    weight = weights(module)["conv.weight"][0, 0]
    out = torch.empty_like(x)
    for b, c in itertools.product(range(2), range(7)):
        logit = sum(float(weight[k] * x[b, (c + k - 1) % 7].mean()) for k in range(3))
        out[b, c] = x[b, c] * sigmoid(logit)
    torch.testing.assert_close(module(x), out)


def test_wide_eca_matches_its_equation():
    module = seeded(WideECA, 7, width=4)
    x = image(2, 7, 2, 3)
    w = weights(module)
    out = torch.empty_like(x)
    for b, c in itertools.product(range(2), range(7)):
        logit = float(w["conv2.bias"])
        for k, d in itertools.product(range(3), range(4)):
            if 0 <= c + k - 1 < 7:
                hidden = w["conv.weight"][d, 0, 0] * x[b, c + k - 1].mean() + w["conv.bias"][d]
                logit += float(w["conv2.weight"][0, d, k] * max(0.0, float(hidden)))
        out[b, c] = x[b, c] * sigmoid(logit)
    torch.testing.assert_close(module(x), out)


def test_gct_matches_its_equation():
    module = seeded(GCT, 6)
    x = image(2, 6, 3, 5)
    alpha, beta, gamma = (module.state_dict()[f"gate.{name}"].flatten().tolist() for name in ("alpha", "beta", "gamma"))
    out = torch.empty_like(x)
    for b in range(2):
        s = [alpha[c] * math.sqrt(sum(float(v) ** 2 for v in x[b, c].flatten()) + 1e-5) for c in range(6)]
        norm = math.sqrt(sum(value**2 for value in s) + 6 * 1e-5)
        for c in range(6):
            normalised = math.sqrt(6) * s[c] / norm  # √C ŝ / ‖s‖, the paper's form
            out[b, c] = x[b, c] * (1 + math.tanh(gamma[c] * normalised + beta[c]))
    torch.testing.assert_close(module(x), out)


def test_gct_starts_as_the_identity():
    x = image(2, 6, 3, 5)
    assert torch.equal(GCT(6).double()(x), x)


# the first half of the authors' list
BEST_FREQUENCIES = [(0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0)]


@pytest.mark.parametrize(("channels", "frequencies", "size"), [(16, 8, (7, 14)), (7, 8, (5, 9)), (8, 4, (21, 3))])
def test_fcanet_matches_its_equation(channels, frequencies, size):
    module = seeded(FcaNet, channels, frequencies=frequencies, reduction=2)
    x = image(2, channels, *size)
    w = weights(module)
    groups = min(channels, frequencies)
    height, width = size

    def cosine(index, frequency, length):
        value = math.cos(math.pi * frequency * (index + 0.5) / length)
        return value * math.sqrt(2) if frequency else value

    out = torch.empty_like(x)
    for b in range(2):
        z = torch.zeros(channels, dtype=torch.float64)
        for c in range(channels):
            u, v = BEST_FREQUENCIES[math.floor(c * groups / channels)]
            for i, j in itertools.product(range(height), range(width)):
                weight = cosine(i, math.floor(u * height / 7), height) * cosine(j, math.floor(v * width / 7), width)
                z[c] += x[b, c, i, j] * weight / (height * width)
        logits = w["mlp.2.weight"] @ torch.relu(w["mlp.0.weight"] @ z)
        for c in range(channels):
            out[b, c] = x[b, c] * sigmoid(float(logits[c]))
    torch.testing.assert_close(module(x), out)


def test_fcanet_with_one_frequency_equals_se_without_biases():
    module, se = seeded(FcaNet, 8, frequencies=1, reduction=2), seeded(SE, 8, reduction=2)
    w = weights(module)
    se.load_state_dict(
        {
            "attention.fc1.weight": w["mlp.0.weight"][..., None, None],
            "attention.fc1.bias": torch.zeros(4),
            "attention.fc2.weight": w["mlp.2.weight"][..., None, None],
            "attention.fc2.bias": torch.zeros(8),
        }
    )
    x = image(2, 8, 5, 6)
    torch.testing.assert_close(module(x), se(x))


def test_fcanet_weights_do_not_depend_on_the_image_size():
    assert set(FcaNet(32).state_dict()) == {"mlp.0.weight", "mlp.2.weight"}


def test_invalid_arguments_raise():
    refuses(ValueError, "reduction must be ≥ 1", SE, 8, reduction=0)
    refuses(ValueError, "width must be ≥ 1, got 0", WideECA, 8, width=0)
    refuses(ValueError, "frequencies must be between 1 and 16, got 17", FcaNet, 32, frequencies=17)
