"""Test the global contexts against slow loops from the papers' equations."""

import itertools
import math

import pytest
import torch
from timm.layers import create_attn

from tests.attention.mechanisms import image, normalised, seeded, weights
from tests.refusals import refuses
from visionattn.attention import DoubleAttention, GlobalContext, GlobalContextGate, Lambda
from visionattn.capture import FullAttention, capture


def captured(module, x):
    """Return the records of one call."""
    with torch.no_grad(), capture(module, FullAttention()) as records:
        module(x)
    return records


@pytest.mark.parametrize(("mechanism", "mlp"), [(GlobalContext, "mlp_add"), (GlobalContextGate, "mlp_scale")])
def test_global_context_matches_its_equation_and_is_captured(mechanism, mlp):
    module = seeded(mechanism, 6)
    x = image(2, 6, 3, 4)
    w = weights(module)
    out, maps = torch.empty_like(x), torch.empty(2, 12, dtype=torch.float64)
    for b in range(2):
        flat = x[b].flatten(1)
        key = w["conv_attn.weight"][0, :, 0, 0]
        scores = torch.stack([key @ flat[:, n] + w["conv_attn.bias"][0] for n in range(12)])
        maps[b] = scores.exp() / scores.exp().sum()
        context = sum(maps[b, n] * flat[:, n] for n in range(12))
        hidden = w[f"{mlp}.fc1.weight"][:, :, 0, 0] @ context + w[f"{mlp}.fc1.bias"]
        hidden = (hidden - hidden.mean()) / (hidden.var(correction=0) + 1e-6).sqrt()
        hidden = torch.relu(hidden * w[f"{mlp}.norm.weight"] + w[f"{mlp}.norm.bias"])
        result = (w[f"{mlp}.fc2.weight"][:, :, 0, 0] @ hidden + w[f"{mlp}.fc2.bias"])[:, None, None]
        out[b] = x[b] + result if mechanism is GlobalContext else x[b] * torch.sigmoid(result)
    torch.testing.assert_close(module(x), out)
    record, *gate = captured(module, x)
    assert (record.kind, record.grid) == ("cross", (3, 4))
    torch.testing.assert_close(record.weights.double().view(2, 12), maps, atol=1e-6, rtol=1e-5)
    assert [gate_record.kind for gate_record in gate] == ["channel_gate"] * (mechanism is GlobalContextGate)
    if gate:
        torch.testing.assert_close(x * gate[0].weights, out, atol=1e-6, rtol=1e-5, check_dtype=False)


def test_double_attention_matches_its_equation_and_is_captured():
    module = seeded(DoubleAttention, 8)
    x = image(2, 8, 3, 4)
    w = weights(module)
    out, maps = torch.empty_like(x), torch.empty(2, 2, 12, dtype=torch.float64)
    for b in range(2):
        flat = x[b].flatten(1)
        values = w["project.weight"][:, :, 0, 0] @ flat + w["project.bias"][:, None]
        a, gather, distribute = values[:2], values[2:4].exp(), values[4:].exp()
        maps[b] = torch.stack([row / row.sum() for row in gather])
        contexts = [sum(maps[b, m, n] * a[:, n] for n in range(12)) for m in range(2)]
        for n in range(12):
            z = sum(distribute[m, n] / distribute[:, n].sum() * contexts[m] for m in range(2))
            out[b].view(8, 12)[:, n] = flat[:, n] + w["restore.weight"][:, :, 0, 0] @ z + w["restore.bias"]
    torch.testing.assert_close(module(x), out)
    records = captured(module, x)
    (record,) = records
    assert (record.kind, record.grid, record.heads) == ("cross", (3, 4), 2)
    torch.testing.assert_close(record.weights.double().view(2, 2, 12), maps, atol=1e-6, rtol=1e-5)


def test_lambda_matches_its_equation_and_is_captured():
    module = seeded(Lambda, 4, num_heads=2, kernel_size=3)
    x = image(2, 4, 3, 4)
    w = weights(module)
    out, maps = torch.empty_like(x), torch.empty(2, 16, 12, dtype=torch.float64)
    per_channel = {name: value for name, value in w.items() if value.ndim == 1}
    for b in range(2):
        projected = w["qkv.weight"][:, :, 0, 0] @ x[b].flatten(1)
        q, k, v = projected.split([2 * 16, 16, 2])
        q, v = normalised(q.T, per_channel, "norm_q").T, normalised(v.T, per_channel, "norm_v").T
        maps[b] = torch.stack([row.exp() / row.exp().sum() for row in k])
        content = maps[b] @ v.T  # (16 channels of a query, 2 of a value)
        for i, j in itertools.product(range(3), range(4)):
            position = w["conv_lambda.bias"][:, None].expand(16, 2).clone()
            for di, dj in itertools.product(range(3), range(3)):
                row, column = i + di - 1, j + dj - 1
                if 0 <= row < 3 and 0 <= column < 4:
                    position += w["conv_lambda.weight"][:, 0, di, dj, 0][:, None] * v[:, row * 4 + column]
            for head in range(2):
                query = q[16 * head : 16 * head + 16, i * 4 + j]
                out[b, 2 * head : 2 * head + 2, i, j] = query @ (content + position)
    torch.testing.assert_close(module(x), out)
    (record,) = captured(module, x)
    assert (record.kind, record.grid, record.heads) == ("cross", (3, 4), 16)
    torch.testing.assert_close(record.weights.double().view(2, 16, 12), maps, atol=1e-6, rtol=1e-5)


def test_lambda_matches_timm():
    module = seeded(Lambda, 16)
    reference = create_attn("lambda", 16).double().eval()
    reference.load_state_dict(weights(module))
    x = image(2, 16, 7, 5)
    torch.testing.assert_close(module(x), reference(x))


def test_lambda_has_finite_bfloat16_gradients_if_freed_memory_holds_nan():
    torch.manual_seed(0)
    for _ in range(20):  # with torch's conv3d, three in four repetitions fail
        module, x = Lambda(16).bfloat16(), torch.randn(1, 16, 8, 8).bfloat16()
        module(x).float().square().mean().backward()
        assert all(parameter.grad.isfinite().all() for parameter in module.parameters())
        del module
        _ = [torch.full((size,), math.nan) for size in (100, 1000, 10000)]  # the next gradients may reuse this memory


def test_invalid_arguments_raise():
    refuses(ValueError, "6 channels are not a multiple of num_heads=4; pass a divisor", Lambda, 6, num_heads=4)
    refuses(ValueError, "kernel_size must be odd", Lambda, 8, kernel_size=4)
