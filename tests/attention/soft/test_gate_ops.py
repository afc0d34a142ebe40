"""Test the gate operations against torch's own, and that they do not materialise large gradients."""

import pytest
import torch
from torch import nn

from tests.attention.mechanisms import image
from visionattn.attention.soft.gate_ops import mean, narrowed, outer, pointwise, pooled, pooled_positions, thin


def agree(ours, theirs, *inputs):
    """Assert equal values and equal gradients of all inputs."""
    outs = [form(*inputs) for form in (ours, theirs)]
    torch.testing.assert_close(*outs)
    weights = torch.randn_like(outs[0])
    torch.testing.assert_close(*(torch.autograd.grad(out, inputs, weights) for out in outs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gate_ops_match_torch(layout):
    x = image(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    agree(lambda x: mean(x, 2, 3), lambda x: x.mean((2, 3), keepdim=True), x)
    agree(lambda x: mean(x, 1), lambda x: x.mean(1, keepdim=True), x)
    agree(outer, torch.mul, image(2, 3, 4, 1).requires_grad_(), image(2, 3, 1, 5).requires_grad_())
    for bias in (True, False):
        conv = nn.Conv2d(3, 2, 1, bias=bias).double()
        agree(lambda x, *_, conv=conv: pointwise(conv, x), lambda x, *_, conv=conv: conv(x), x, *conv.parameters())
        agree(lambda x, *_, conv=conv: narrowed(conv, x), lambda x, *_, conv=conv: conv(x), x, *conv.parameters())
    conv = nn.Conv2d(3, 3, 3, padding=1, groups=3).double()
    agree(lambda x, *_: thin(conv, x), lambda x, *_: conv(x), x, *conv.parameters())
    assert thin(conv, x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dims", [1, 2, 3, (2, 3)])
def test_pooled_values_and_input_share_one_gradient_pass(layout, dims):
    def ours(x):
        return pooled_positions(x) if isinstance(dims, tuple) else pooled(x, dims)

    def theirs(x):
        return x, x.mean(dims, keepdim=True), x.amax(dims, keepdim=True)

    def together(parts):
        return sum((number * part.sin()).sum() for number, part in enumerate(parts, 1))

    x = image(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    agree(lambda x: together(ours(x)), lambda x: together(theirs(x)), x)
    torch.testing.assert_close(ours(x), theirs(x))
    assert ours(x)[0].is_contiguous(memory_format=layout)
    assert torch.autograd.gradgradcheck(ours, x)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x))


def test_half_precision_mean_does_not_overflow():
    assert mean(torch.full((1, 1, 16, 16), 1000.0, dtype=torch.float16), 2, 3).item() == 1000


def test_gradient_of_a_mean_is_a_view():
    strides = {}
    for name, form in {"ours": mean, "torch": lambda x, *dims: x.mean(dims, keepdim=True)}.items():
        x = torch.randn(2, 3, 4, 5, requires_grad=True) * 1
        x.register_hook(lambda grad, name=name: strides.update({name: grad.stride()}))
        form(x, 2, 3).sum().backward()
    assert strides["ours"][2:] == (0, 0)
    assert strides["torch"][2:] != (0, 0)
