"""Test the gates over positions against slow loops from their papers' equations."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from timm.layers import GatherExcite as GatherExciteOfTimm
from torch import nn

from tests.attention.mechanisms import image, normalised, randomised, seeded, sigmoid, weights
from tests.refusals import refuses
from tests.versions import needs_onnx_exporter
from visionattn.attention import LSKA, AttentionGate, GatherExcite
from visionattn.capture import NoWeights, capture


def test_attention_gate_matches_its_equation():
    torch.manual_seed(0)
    module = randomised(AttentionGate(4, 6, width=3)).double()
    x, signal = image(2, 4, 5, 7), image(2, 6, 5, 7)  # equal sizes: no interpolation
    w = weights(module)
    out = torch.empty_like(x)
    for b, i, j in itertools.product(range(2), range(5), range(7)):
        near = w["of_input.weight"][:, :, 0, 0] @ x[b, :, i, j]
        far = w["of_signal.weight"][:, :, 0, 0] @ signal[b, :, i, j] + w["of_signal.bias"]
        logit = w["score.weight"][0, :, 0, 0] @ torch.relu(near + far) + w["score.bias"][0]
        out[b, :, i, j] = x[b, :, i, j] * sigmoid(float(logit))
    torch.testing.assert_close(module(x, signal), out)


def test_coarser_signal_is_upsampled_bilinearly():
    torch.manual_seed(0)
    module = randomised(AttentionGate(4, 6)).double()
    x, signal = image(2, 4, 6, 8), image(2, 6, 3, 4)
    upsampled = torch.empty(2, 6, 6, 8, dtype=torch.float64)
    for i, j in itertools.product(range(6), range(8)):
        row, column = (min(max((index + 0.5) / 2 - 0.5, 0), size - 1) for index, size in ((i, 3), (j, 4)))
        top, left = math.floor(row), math.floor(column)
        upsampled[:, :, i, j] = sum(
            (1 - abs(row - y)) * (1 - abs(column - z)) * signal[:, :, y, z]
            for y, z in itertools.product({top, min(top + 1, 2)}, {left, min(left + 1, 3)})
        )
    torch.testing.assert_close(module(x, signal), module(x, upsampled))


@pytest.mark.parametrize(("size", "coarse"), [((1, 1), (1, 1)), ((5, 9), (2, 4)), ((7, 4), (3, 1))])
def test_attention_gate_accepts_every_size_and_is_captured(size, coarse):
    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.down, self.lift, self.skip = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 7, 1), AttentionGate(7, 5)

        def forward(self, images):
            return self.skip(self.lift(images), F.adaptive_avg_pool2d(self.down(images), coarse))

    model, images = Decoder(), torch.randn(1, 3, *size, requires_grad=True)
    with capture(model, NoWeights()) as records:
        out = model(images)
    assert [(record.kind, record.weights.shape) for record in records] == [
        ("spatial_gate" if size != (1, 1) else "channel_gate", (1, 1, *size))
    ]
    torch.testing.assert_close(out, model.lift(images) * records[0].weights)
    out.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@needs_onnx_exporter
def test_attention_gate_exports_to_onnx(tmp_path):
    import onnxruntime

    module = randomised(AttentionGate(4, 6)).eval()
    inputs = torch.randn(1, 4, 6, 8), torch.randn(1, 6, 3, 4)
    torch.onnx.export(module, inputs, tmp_path / "gate.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "gate.onnx")
    names = [session_input.name for session_input in session.get_inputs()]
    (out,) = session.run(None, dict(zip(names, (value.numpy() for value in inputs), strict=True)))
    torch.testing.assert_close(torch.from_numpy(out), module(*inputs).detach(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("extent", [0, 2, 4])
def test_gather_excite_without_weights_matches_its_equation_and_timm(extent):
    module = GatherExcite(3, extent=extent, learned=False)
    x = image(2, 3, 9, 6)
    out = torch.empty_like(x)
    for b, c, i, j in itertools.product(range(2), range(3), range(9), range(6)):
        if extent:
            grid = math.ceil(9 / extent), math.ceil(6 / extent)
            row, column = (extent * (index * n // size) for index, n, size in ((i, grid[0], 9), (j, grid[1], 6)))
            top, left = max(0, row - extent + 1), max(0, column - extent + 1)
            neighbourhood = x[b, c, top : row + extent, left : column + extent]
        else:
            neighbourhood = x[b, c]
        out[b, c, i, j] = x[b, c, i, j] * sigmoid(float(neighbourhood.mean()))
    torch.testing.assert_close(module(x), out)
    torch.testing.assert_close(module(x), GatherExciteOfTimm(3, extent=extent, use_mlp=False)(x))


def test_gather_excite_with_weights_matches_its_equation():
    module = seeded(GatherExcite, 3, extent=4)
    x = image(2, 3, 7, 9)
    w = weights(module)
    out = torch.empty_like(x)
    for b, c in itertools.product(range(2), range(3)):
        plane = x[b, c]
        for layer in (0, 3):
            padded = F.pad(plane, (1, 1, 1, 1))
            plane = torch.empty((plane.shape[0] + 1) // 2, (plane.shape[1] + 1) // 2, dtype=torch.float64)
            for i, j in itertools.product(*map(range, plane.shape)):
                plane[i, j] = (padded[2 * i : 2 * i + 3, 2 * j : 2 * j + 3] * w[f"gather.{layer}.weight"][c, 0]).sum()
            of_channel = {name: value[c] for name, value in w.items() if value.ndim}
            plane = normalised(plane, of_channel, f"gather.{layer + 1}")
            plane = plane.relu() if layer == 0 else plane
        for i, j in itertools.product(range(7), range(9)):
            out[b, c, i, j] = x[b, c, i, j] * sigmoid(float(plane[i * 2 // 7, j * 3 // 9]))
    torch.testing.assert_close(module(x), out)


@pytest.mark.parametrize(("kernel_size", "dilation", "far"), [(11, 2, 5), (7, 2, 3), (23, 3, 7)])
def test_lska_matches_its_equation(kernel_size, dilation, far):
    module = seeded(LSKA, 3, kernel_size=kernel_size, dilation=dilation)
    x = image(2, 3, 6, 9)
    w = weights(module)
    near = 2 * dilation - 1
    planes = x
    for layer, size, step, axis in ((0, near, 1, 3), (1, near, 1, 2), (2, far, dilation, 3), (3, far, dilation, 2)):
        assert w[f"gate.{layer}.weight"].numel() == 3 * size
        found = w[f"gate.{layer}.bias"][None, :, None, None].expand_as(planes).clone()
        for k in range(size):
            shift = step * (k - size // 2)
            for position in range(planes.shape[axis]):
                if 0 <= position + shift < planes.shape[axis]:
                    weight = w[f"gate.{layer}.weight"].flatten(1)[None, :, k, None]
                    found.select(axis, position).add_(weight * planes.select(axis, position + shift))
        planes = found
    gate = torch.empty_like(x)
    for c in range(3):
        gate[:, c] = w["gate.4.bias"][c] + sum(w["gate.4.weight"][c, d, 0, 0] * planes[:, d] for d in range(3))
    torch.testing.assert_close(module(x), x * gate)


def test_invalid_arguments_raise():
    refuses(ValueError, "extent must be 0 or a power of two ≥ 2, got 3", GatherExcite, 8, extent=3)
    refuses(ValueError, r"kernel_size // dilation must be odd, .*, got 8 // 2", LSKA, 8, kernel_size=8)
    refuses(ValueError, "width must be ≥ 1, got 0", AttentionGate, 8, 8, width=0)
