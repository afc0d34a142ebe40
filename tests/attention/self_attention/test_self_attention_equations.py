"""Test all forms of self-attention: equations computed for each pair of patches, precision, and invalid arguments."""

from functools import partial

import pytest
import torch

from tests.attention.self_attention.attended_by_hand import MASKED, attended, weights_by_hand
from tests.attention.self_attention.forms import qkv
from tests.refusals import refuses
from visionattn import attention
from visionattn.errors import UsageError

close = torch.testing.assert_close
masked = pytest.mark.parametrize(("make", "m"), MASKED.values(), ids=MASKED)
GRIDS = [(9, 13), (2, 3), (1, 8), (1, 1)]


@masked
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("calls", ["default", "blocks", "one call"])
def test_output_and_gradients_match_dense_attention_with_the_mask(make, m, grid, prefix, calls, request):
    if calls == "blocks":
        request.getfixturevalue("blocks")
    module, inputs = make(2), qkv(grid, prefix)
    upstream = torch.randn_like(inputs[0])
    if calls == "one call":
        module.attend = module.dense
    out = module(*inputs, grid=grid, num_prefix_tokens=prefix)
    expected, _ = attended(*inputs, weights_by_hand(m, 2, grid, prefix))
    close(out.double(), expected, atol=1e-5, rtol=0)
    found = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    for gradient, reference in zip(found, torch.autograd.grad(expected, inputs, upstream.double()), strict=True):
        close(gradient, reference, atol=1e-5, rtol=0)


ALL_FORMS = {name: make for name, (make, _) in MASKED.items()} | {
    "dense": attention.Dense,
    "pooled keys": partial(attention.PooledKeys, pool=2),
    "top-k": partial(attention.TopK, k=3),
}
every = pytest.mark.parametrize("make", ALL_FORMS.values(), ids=ALL_FORMS)


@every
@pytest.mark.usefixtures("blocks")
def test_bfloat16_is_close_to_float32_and_dropout_changes_the_output(make):
    grid, module = (9, 7), make(2).bfloat16()
    inputs = qkv(grid, 1, batch=1, dtype=torch.bfloat16)
    out = module(*inputs, grid=grid, num_prefix_tokens=1)
    assert out.dtype == torch.bfloat16
    module.float()
    exact = module(*(x.float() for x in inputs), grid=grid, num_prefix_tokens=1)
    if make is not ALL_FORMS["top-k"]:  # rounding changes which logits TopK selects
        close(out.float(), exact, atol=0.05, rtol=0)
    out.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    dropped = module(*(x.float() for x in inputs), grid=grid, num_prefix_tokens=1, dropout_p=0.5)
    assert dropped.isfinite().all()
    assert not torch.equal(dropped, exact)


@every
def test_wrong_number_of_tokens_and_zero_heads_raise(make):
    with pytest.raises(UsageError, match="needs every token of the grid: 4×4 patches and 1 prefix tokens, got 16"):
        make(2)(*qkv((4, 4), 0), grid=(4, 4), num_prefix_tokens=1)
    refuses(ValueError, "num_heads must be ≥ 1, got 0", make, 0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: attention.Windowed(1, window=4, shift=4), r"shift in \[0, window\), got 4 and 4"),
        (lambda: attention.Neighbourhood(1, size=0), "size and dilation must be ≥ 1, got 0 and 1"),
        (lambda: attention.Neighbourhood(1, size=3, dilation=0), "size and dilation must be ≥ 1, got 3 and 0"),
        (lambda: attention.Neighbourhood(1, size=3, stride=4), r"stride must be in \[1, size\], got 4 with size 3"),
        (lambda: attention.PooledKeys(1, pool=0), "pool must be ≥ 1, got 0"),
        (lambda: attention.TopK(1, k=0), "k must be ≥ 1, got 0"),
        (lambda: attention.AdaptiveSpan(1, max_span=0), "max_span and ramp must be > 0"),
        (lambda: attention.BlockSparse(1, allowed=None, block=0), "block must be ≥ 1, got 0"),
    ],
)
def test_options_out_of_range_raise(make, text):
    refuses(ValueError, text, make)
