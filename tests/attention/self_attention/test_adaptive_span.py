"""Test adaptive spans: the paper's ramp, its gradient and bounds, and the number of computed products."""

from functools import partial

import pytest
import torch

from tests.attention.self_attention.forms import ProductCounter, qkv
from visionattn import attention

close = torch.testing.assert_close


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("calls", ["default", "blocks"])
def test_gradient_of_spans_matches_finite_differences(prefix, calls, request):
    if calls == "blocks":
        request.getfixturevalue("blocks")
    grid = (4, 5)
    module = attention.AdaptiveSpan(3, max_span=4, ramp=1.7).double()
    inputs = qkv(grid, prefix, batch=1, heads=3, width=4, dtype=torch.float64)
    span = torch.tensor([0.06, 0.4, 0.78], dtype=torch.float64, requires_grad=True)  # the slope jumps elsewhere

    def output(span):
        call = partial(torch.func.functional_call, module, {"span": span}, tuple(inputs))
        return call({"grid": grid, "num_prefix_tokens": prefix})

    assert torch.autograd.gradcheck(output, span)
    assert torch.autograd.grad(output(span).square().sum(), span)[0].abs().min() > 1e-3


def test_ramp_matches_the_paper():
    module = attention.AdaptiveSpan(1, max_span=3, ramp=2, init=1 / 3)
    close(module.reach(4)[0, 4], torch.tensor([0, 0, 0.5, 1, 1, 1, 0.5, 0, 0]))
    close(module.reach(4)[0], module.reach(4)[0].T)
    close(module.spans, torch.tensor([1.0]))


@pytest.mark.parametrize("compiled", [False, True])
def test_spans_stay_within_bounds_and_can_leave_them(compiled):
    module = attention.AdaptiveSpan(2, max_span=4)
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    optimizer = torch.optim.SGD(module.parameters(), lr=10)
    for sign in (1, -1):  # a large step to below 0, then a large step to above 1
        (sign * attention.mean_span(module)).backward()
        optimizer.step()
        run(*qkv((2, 2), 0), grid=(2, 2))
        close(module.span.data, torch.full((2,), float(sign < 0)))
        optimizer.zero_grad()


def test_every_head_computes_only_patches_within_its_span():
    grid = (32, 32)
    module = attention.AdaptiveSpan(3, max_span=32, ramp=2).eval()
    inputs = [x.detach() for x in qkv(grid, 1, batch=1, heads=3)]
    fractions = {}  # spans of the heads: computed products, as a fraction of dense attention
    for spans in ((0, 0, 0), (0, 0, 32), (4, 4, 4), (32, 32, 32)):
        with torch.no_grad(), ProductCounter() as counter:
            module.span.copy_(torch.tensor(spans) / 32)
            out = module(*inputs, grid=grid, num_prefix_tokens=1)
        fractions[spans] = counter.products / (3 * 1025**2)
        with torch.no_grad():
            close(module.dense(*inputs, grid, 1, 0.0), out, atol=1e-5, rtol=0)
    assert fractions[32, 32, 32] == 1
    assert fractions[0, 0, 0] < 0.1
    assert fractions[4, 4, 4] < 0.4
    close(fractions[0, 0, 32], (2 * fractions[0, 0, 0] + 1) / 3, atol=1e-3, rtol=0)
