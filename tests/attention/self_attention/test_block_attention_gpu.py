"""On a GPU, the forms of self-attention equal those on the CPU, also compiled by Inductor and in bf16."""

import pytest
import torch

from tests.attention.self_attention.attended_by_hand import MASKED

pytestmark = pytest.mark.gpu

GRID, HEADS, PREFIX = (6, 9), 2, 1


def tokens(seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, HEADS, PREFIX + GRID[0] * GRID[1], 16, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("name", MASKED)
def test_a_form_on_a_gpu_equals_the_form_on_the_cpu(name, gpu):
    form, qkv = MASKED[name][0](HEADS).eval(), tokens(0)
    with torch.no_grad():
        expected = form(*qkv, grid=GRID, num_prefix_tokens=PREFIX)
        form, moved = form.to(gpu), [part.to(gpu) for part in qkv]
        found = form(*moved, grid=GRID, num_prefix_tokens=PREFIX)
        in_bf16 = form(*(part.bfloat16() for part in moved), grid=GRID, num_prefix_tokens=PREFIX)
    torch.testing.assert_close(found.cpu(), expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(in_bf16.float().cpu(), expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("name", ["windowed, shifted", "neighbourhood"])
def test_inductor_computes_the_same_outputs_and_gradients(name, gpu):
    form = MASKED[name][0](HEADS).to(gpu)
    qkv = [part.to(gpu).requires_grad_() for part in tokens(1)]
    results = []
    for function in (form, torch.compile(form, fullgraph=True)):
        out = function(*qkv, grid=GRID, num_prefix_tokens=PREFIX)
        results.append([out, *torch.autograd.grad(out.square().sum(), qkv)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-3)
