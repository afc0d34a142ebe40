"""Forms of self-attention, against their equations pair by pair."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from tests.attention.attended_by_hand import MASKED, attended, weights_by_hand
from visionattn import attention
from visionattn.attention import local, neighbourhood
from visionattn.attention.self_attention import in_one_call
from visionattn.errors import UsageError

close = torch.testing.assert_close
F = nn.functional
masked = pytest.mark.parametrize(("make", "m"), MASKED.values(), ids=MASKED)
GRIDS = [(9, 13), (2, 3), (1, 8), (1, 1)]


@pytest.fixture
def blocks(monkeypatch):
    """Blocks wherever they save products, though the grids here are too small for them to save time."""
    for cost in ("_KEY", "_COPY", "_CALL"):
        monkeypatch.setattr(local, cost, 0)
    monkeypatch.setattr(local, "_plans", {})


def qkv(grid, prefix, *, batch=2, heads=2, width=8, dtype=torch.float32):
    """As a transformer projects them: all heads of a token together in memory."""
    torch.manual_seed(0)
    x = torch.randn(3, batch, prefix + grid[0] * grid[1], heads, width).to(dtype).transpose(2, 3)
    return [part.detach().requires_grad_() for part in x]


class Counted(TorchFunctionMode):
    """Counts products of a query with a key in calls of the fused attention."""

    products = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.products += args[0].shape[:-1].numel() * args[1].shape[-2]
        return func(*args, **(kwargs or {}))


@masked
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("prefix", [0, 3])
@pytest.mark.parametrize("way", ["chosen", "blocks", "one call"])
def test_output_and_every_gradient_are_those_of_dense_attention_with_the_mask(make, m, grid, prefix, way, request):
    if way == "blocks":
        request.getfixturevalue("blocks")
    module, inputs = make(2), qkv(grid, prefix)
    upstream = torch.randn_like(inputs[0])
    if way == "one call":
        with in_one_call():
            out = module(*inputs, grid=grid, num_prefix_tokens=prefix)
    else:
        out = module(*inputs, grid=grid, num_prefix_tokens=prefix)
    expected, _ = attended(*inputs, weights_by_hand(m, 2, grid, prefix))
    close(out.double(), expected, atol=1e-5, rtol=0)
    found = torch.autograd.grad(out, inputs, upstream, retain_graph=True)
    for one, other in zip(found, torch.autograd.grad(expected, inputs, upstream.double()), strict=True):
        close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("way", ["chosen", "blocks"])
def test_the_gradient_of_spans_is_that_of_finite_differences(prefix, way, request):
    if way == "blocks":
        request.getfixturevalue("blocks")
    grid = (4, 5)
    module = attention.AdaptiveSpan(3, max_span=4, ramp=1.7).double()
    inputs = qkv(grid, prefix, batch=1, heads=3, width=4, dtype=torch.float64)
    span = torch.tensor([0.06, 0.4, 0.78], dtype=torch.float64, requires_grad=True)  # between the kinks of m

    def output(span):
        call = partial(torch.func.functional_call, module, {"span": span}, tuple(inputs))
        return call({"grid": grid, "num_prefix_tokens": prefix})

    assert torch.autograd.gradcheck(output, span)
    assert torch.autograd.grad(output(span).square().sum(), span)[0].abs().min() > 1e-3


def test_the_ramp_is_that_of_the_paper():
    module = attention.AdaptiveSpan(1, max_span=3, ramp=2, init=1 / 3)
    close(module.reach(4)[0, 4], torch.tensor([0, 0, 0.5, 1, 1, 1, 0.5, 0, 0]))
    close(module.reach(4)[0], module.reach(4)[0].T)
    close(module.spans, torch.tensor([1.0]))


@pytest.mark.parametrize("compiled", [False, True])
def test_spans_stay_within_their_bounds_and_come_back_from_the_edge(compiled):
    module = attention.AdaptiveSpan(2, max_span=4)
    run = torch.compile(module, backend="aot_eager", fullgraph=True) if compiled else module
    optimizer = torch.optim.SGD(module.parameters(), lr=10)
    for sign in (1, -1):  # far below 0, then far beyond 1
        (sign * attention.mean_span(module)).backward()
        optimizer.step()
        run(*qkv((2, 2), 0), grid=(2, 2))
        close(module.span.data, torch.full((2,), float(sign < 0)))
        optimizer.zero_grad()


def test_every_head_computes_its_own_span_and_no_more():
    grid = (32, 32)
    module = attention.AdaptiveSpan(3, max_span=32, ramp=2).eval()
    inputs = [x.detach() for x in qkv(grid, 1, batch=1, heads=3)]
    counts = {}
    for spans in ((0, 0, 0), (0, 0, 32), (4, 4, 4), (32, 32, 32)):
        with torch.no_grad(), Counted() as counted:
            module.span.copy_(torch.tensor(spans) / 32)
            out = module(*inputs, grid=grid, num_prefix_tokens=1)
        counts[spans] = counted.products / (3 * 1025**2)
        with torch.no_grad(), in_one_call():
            close(module(*inputs, grid=grid, num_prefix_tokens=1), out, atol=1e-5, rtol=0)
    assert counts[32, 32, 32] == 1
    assert counts[0, 0, 0] < 0.1
    assert counts[4, 4, 4] < 0.4
    close(counts[0, 0, 32], (2 * counts[0, 0, 0] + 1) / 3, atol=1e-3, rtol=0)


def test_blocks_are_chosen_where_they_save_and_one_call_where_they_do_not():
    assert neighbourhood.blocks((8, 8), 5) is None
    for grid, most in (((64, 64), 0.25), ((128, 128), 0.06)):
        rows, columns = neighbourhood.blocks(grid, 17)
        products = [sum(run.count * run.block * run.extent for run in runs) for runs in (rows, columns)]
        assert products[0] * products[1] < most * (grid[0] * grid[1]) ** 2


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("grid", [(5, 7), (2, 1)])
def test_pooled_keys_are_means(grid, prefix):
    q, k, v = qkv(grid, prefix)
    cells = [
        [row * grid[1] + column + prefix for row in range(*rows) for column in range(*columns)]
        for rows in ((top, min(top + 2, grid[0])) for top in range(0, grid[0], 2))
        for columns in ((left, min(left + 2, grid[1])) for left in range(0, grid[1], 2))
    ]
    cells = [[token] for token in range(prefix)] + cells
    pooled = [torch.stack([x[:, :, some].mean(2) for some in cells], 2) for x in (k, v)]
    expected, _ = attended(q, *pooled, 1)
    out = attention.PooledKeys(2, pool=2)(q, k, v, grid=grid, num_prefix_tokens=prefix)
    close(out.double(), expected, atol=1e-5, rtol=0)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), (q, k, v)) for y in (out, expected)), strict=True):
        close(one, other, atol=1e-4, rtol=0)


@pytest.mark.parametrize(("k", "prefix"), [(4, 2), (1, 0), (99, 1)])
def test_top_k_keeps_the_largest(k, prefix):
    grid = (3, 5)
    inputs = qkv(grid, prefix)
    m = torch.ones(2, 2, prefix + 15, prefix + 15)
    scores = inputs[0] @ inputs[1].mT
    for b in range(2):
        for h in range(2):
            for i in range(prefix, prefix + 15):
                row = scores[b, h, i, prefix:].tolist()
                for j, score in enumerate(row):
                    m[b, h, i, prefix + j] = score in sorted(row)[-k:]
    expected, _ = attended(*inputs, m.double())
    out = attention.TopK(2, k=k)(*inputs, grid=grid, num_prefix_tokens=prefix)
    close(out.double(), expected, atol=1e-5, rtol=0)
    for one, other in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (out, expected)), strict=True):
        close(one, other, atol=1e-4, rtol=0)


EVERY = {name: make for name, (make, _) in MASKED.items()} | {
    "dense": attention.Dense,
    "pooled keys": partial(attention.PooledKeys, pool=2),
    "top-k": partial(attention.TopK, k=3),
}
every = pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)


@every
@pytest.mark.usefixtures("blocks")
def test_half_precision_one_image_and_dropout(make):
    grid, module = (9, 7), make(2).bfloat16()
    inputs = qkv(grid, 1, batch=1, dtype=torch.bfloat16)
    out = module(*inputs, grid=grid, num_prefix_tokens=1)
    assert out.dtype == torch.bfloat16
    module.float()
    exact = module(*(x.float() for x in inputs), grid=grid, num_prefix_tokens=1)
    if make is not EVERY["top-k"]:  # which rounds before it chooses
        close(out.float(), exact, atol=0.05, rtol=0)
    out.float().square().sum().backward()
    assert all(x.grad.isfinite().all() for x in inputs)
    dropped = module(*(x.float() for x in inputs), grid=grid, num_prefix_tokens=1, dropout_p=0.5)
    assert dropped.isfinite().all()
    assert not torch.equal(dropped, exact)


@every
def test_tokens_that_are_no_grid_and_bad_options_are_refused(make):
    with pytest.raises(UsageError, match="needs every token of the grid: 4×4 patches and 1 before them, and got 16"):
        make(2)(*qkv((4, 4), 0), grid=(4, 4), num_prefix_tokens=1)
    with pytest.raises(ValueError, match="num_heads must be ≥ 1, got 0"):
        make(0)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: attention.Windowed(1, window=4, shift=4), r"shift in \[0, window\), got 4 and 4"),
        (lambda: attention.Neighbourhood(1, size=4), "size must be odd and ≥ 1, got 4"),
        (lambda: attention.PooledKeys(1, pool=0), "pool must be ≥ 1, got 0"),
        (lambda: attention.TopK(1, k=0), "k must be ≥ 1, got 0"),
        (lambda: attention.AdaptiveSpan(1, max_span=0), "max_span and ramp must be > 0"),
        (lambda: attention.BlockSparse(1, allowed=None, block=0), "block must be ≥ 1, got 0"),
    ],
)
def test_options_out_of_range_are_named(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def test_a_mask_that_leaves_a_patch_nothing_is_refused():
    module = attention.BlockSparse(1, allowed=lambda a, b, c, d: (a != 1) & (c == c) & (b == b) & (d == d))
    with pytest.raises(UsageError, match=r"patch \(1, 0\) of a grid of 2×3 attend to none"):
        module(*qkv((2, 3), 0, heads=1), grid=(2, 3))


def test_block_sparse_computes_only_blocks_with_a_pair():
    grid = (16, 16)
    near = attention.BlockSparse(2, allowed=lambda a, b, c, d: (a // 4 == c // 4) & (b == b) & (d == d), block=16)
    with torch.no_grad(), Counted() as counted:
        near(*qkv(grid, 0), grid=grid)
    assert counted.products == 2 * 2 * 256 * 64


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("prefix", [0, 3])
def test_the_mask_that_flex_attention_gets_is_the_same(prefix):
    from torch.nn.attention.flex_attention import flex_attention

    make, m = MASKED["block-sparse"]
    grid, module = (5, 7), make(2)
    inputs = [x.detach() for x in qkv(grid, prefix, width=16)]
    out = flex_attention(*inputs, block_mask=module.flex_mask(grid, prefix, inputs[0].device))
    expected, _ = attended(*inputs, weights_by_hand(m, 2, grid, prefix))
    close(out.double(), expected, atol=1e-5, rtol=0)
