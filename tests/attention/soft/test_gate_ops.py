"""Test the gate operations against torch's operations, and that gradients are not materialised."""

import pytest
import torch
from torch import nn

from tests.attention.mechanisms import image
from visionattn.attention.soft.gate_ops import mean, narrowed, outer, pointwise, pooled, pooled_positions, thin


def assert_same(function, reference, *inputs):
    """Assert that two functions have equal values and equal gradients of all inputs."""
    outputs = [call(*inputs) for call in (function, reference)]
    torch.testing.assert_close(*outputs)
    weights = torch.randn_like(outputs[0])
    torch.testing.assert_close(*(torch.autograd.grad(output, inputs, weights) for output in outputs))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gate_ops_match_torch(layout):
    x = image(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    assert_same(lambda x: mean(x, 2, 3), lambda x: x.mean((2, 3), keepdim=True), x)
    assert_same(lambda x: mean(x, 1), lambda x: x.mean(1, keepdim=True), x)
    assert_same(outer, torch.mul, image(2, 3, 4, 1).requires_grad_(), image(2, 3, 1, 5).requires_grad_())
    for bias in (True, False):
        conv = nn.Conv2d(3, 2, 1, bias=bias).double()
        assert_same(
            lambda x, *_, conv=conv: pointwise(conv, x), lambda x, *_, conv=conv: conv(x), x, *conv.parameters()
        )
        assert_same(lambda x, *_, conv=conv: narrowed(conv, x), lambda x, *_, conv=conv: conv(x), x, *conv.parameters())
    conv = nn.Conv2d(3, 3, 3, padding=1, groups=3).double()
    assert_same(lambda x, *_: thin(conv, x), lambda x, *_: conv(x), x, *conv.parameters())
    assert thin(conv, x).is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dims", [1, 2, 3, (2, 3)])
def test_pooled_matches_torch_and_keeps_the_memory_format(layout, dims):
    def function(x):
        return pooled_positions(x) if isinstance(dims, tuple) else pooled(x, dims)

    def reference(x):
        return x, x.mean(dims, keepdim=True), x.amax(dims, keepdim=True)

    def weighted_sum(parts):
        return sum((number * part.sin()).sum() for number, part in enumerate(parts, 1))

    x = image(2, 3, 4, 5).to(memory_format=layout).requires_grad_()
    assert_same(lambda x: weighted_sum(function(x)), lambda x: weighted_sum(reference(x)), x)
    torch.testing.assert_close(function(x), reference(x))
    assert function(x)[0].is_contiguous(memory_format=layout)
    assert torch.autograd.gradgradcheck(function, x)
    with torch.no_grad():
        torch.testing.assert_close(function(x), reference(x))


def test_half_precision_mean_does_not_overflow():
    assert mean(torch.full((1, 1, 16, 16), 1000.0, dtype=torch.float16), 2, 3).item() == 1000


def test_gradient_of_mean_is_an_expanded_view():
    strides = {}
    for name, function in {"ours": mean, "torch": lambda x, *dims: x.mean(dims, keepdim=True)}.items():
        x = torch.randn(2, 3, 4, 5, requires_grad=True) * 1
        x.register_hook(lambda grad, name=name: strides.update({name: grad.stride()}))
        function(x, 2, 3).sum().backward()
    assert strides["ours"][2:] == (0, 0)  # strides of 0: one value per channel in memory
    assert strides["torch"][2:] != (0, 0)
