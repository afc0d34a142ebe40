"""Every gate mechanism against a slow loop from its paper's equation, and on every shape that users have."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from visionattn.attention import CBAM, ECA, SE

MECHANISMS = [SE, ECA, CBAM]


def seeded(mechanism, channels, **options):
    torch.manual_seed(0)
    module = mechanism(channels, **options).double().eval()
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.1 if "running_var" in name else torch.randn_like(tensor))
    return module


def sigmoid(value):
    return 1 / (1 + math.exp(-value))


def test_se_is_its_equation():
    module = seeded(SE, 6, reduction=3)
    x = torch.randn(2, 6, 3, 5, dtype=torch.float64)
    w = {name.removeprefix("attention."): tensor for name, tensor in module.state_dict().items()}
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
def test_eca_is_its_equation(channels, kernel):
    module = seeded(ECA, channels)
    x = torch.randn(2, channels, 2, 3, dtype=torch.float64)
    weight = module.state_dict()["attention.conv.weight"][0, 0]
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


def test_cbam_is_its_equation():
    module = seeded(CBAM, 4, reduction=2, kernel_size=3)
    x = torch.randn(2, 4, 5, 3, dtype=torch.float64)
    w = {name.removeprefix("attention."): tensor for name, tensor in module.state_dict().items()}

    def mlp(z):
        return w["channel.fc2.weight"][:, :, 0, 0] @ torch.relu(w["channel.fc1.weight"][:, :, 0, 0] @ z)

    out = torch.empty_like(x)
    for b in range(2):
        gate_C = torch.sigmoid(mlp(x[b].flatten(1).mean(1)) + mlp(x[b].flatten(1).max(1).values))
        gated = x[b] * gate_C[:, None, None]
        planes = F.pad(torch.stack([gated.mean(0), gated.max(0).values]), (1, 1, 1, 1))
        for row, column in itertools.product(range(5), range(3)):
            value = (planes[:, row : row + 3, column : column + 3] * w["spatial.conv.conv.weight"][0]).sum()
            value = (value - w["spatial.conv.bn.running_mean"]) / (w["spatial.conv.bn.running_var"] + 1e-5).sqrt()
            value = value * w["spatial.conv.bn.weight"] + w["spatial.conv.bn.bias"]
            out[b, :, row, column] = gated[:, row, column] * torch.sigmoid(value)
    torch.testing.assert_close(module(x), out)


@pytest.mark.parametrize("mechanism", MECHANISMS)
@pytest.mark.parametrize("shape", [(1, 1, 2, 3), (2, 7, 5, 9), (3, 16, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_mechanism_takes_every_shape(mechanism, shape, dtype):
    module = mechanism(shape[1]).to(dtype)
    x = torch.randn(shape, dtype=dtype).to(memory_format=torch.channels_last).requires_grad_()
    out = module(x)
    assert out.shape == x.shape
    assert out.dtype == dtype
    out.float().square().mean().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_images_of_a_batch_do_not_touch_each_other(mechanism):
    module = mechanism(8).eval()
    x = torch.randn(3, 8, 6, 4)
    torch.testing.assert_close(module(x)[1:2], module(x[1:2]))


def test_arguments_that_cannot_work_are_named():
    with pytest.raises(ValueError, match="kernel_size must be odd"):
        CBAM(8, kernel_size=4)
    with pytest.raises(ValueError, match="reduction must be ≥ 1"):
        SE(8, reduction=0)
