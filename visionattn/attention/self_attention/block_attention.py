"""Local attention on a grid, computed in blocks of queries, each with the rectangle of keys that it attends to.

Rows and columns are cut separately, each into runs of equal blocks. One call of `scaled_dot_product_attention` computes
a region: the blocks in which one block of rows crosses one run of columns. The blocks of a region share a bias.

Shapes: B batch, H heads, h × w grid, D channels of a head; G blocks of Q queries and K keys.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

Reach: TypeAlias = Sequence[tuple[int, int]]
"""For every row (or column) of queries, the first row of keys in its reach and the row after the last one.

Neither number decreases from one row of queries to the next.
"""

BLOCKS = 4, 8, 12, 16, 24, 32
# Costs with 64 channels per head; 1 is the cost of one query-key product in a single call over all tokens. In blocks,
# the costs are _PRODUCT for a product, _KEY for a key of a block, _COPY for a copied token and _CALL for a call.
# _MASKED is the cost of a product in a single call with a mask.
_PRODUCT, _KEY, _COPY, _CALL, _MASKED = 1.25, 80.0, 30.0, 10_000.0, 1.2
_TOGETHER = 1 << 20  # attention weights computed at a time for the gradient of a learned bias


@dataclass(frozen=True)
class Run:
    """Consecutive equal blocks of rows (or columns).

    Attributes:
        count: number of blocks.
        block: rows of queries in each block.
        start: first row of keys of the first block; the keys of each next block start `block` rows further.
        extent: rows of keys of each block.
        offset: row of the first query, relative to `start`.
        reach: for each row of queries, its first row of keys and the row after the last, relative to the block's first
            row of keys.
    """

    count: int
    block: int
    start: int
    extent: int
    offset: int
    reach: tuple[tuple[int, int], ...]

    def allowed(self, device: torch.device) -> Tensor:
        """(block, extent) bool: which rows of keys each row of queries reaches."""
        low, high = torch.tensor(self.reach, device=device).T[..., None]
        key = torch.arange(self.extent, device=device)
        return (low <= key) & (key < high)

    def distance(self, device: torch.device) -> Tensor:
        """(block, extent): number of rows between query and key."""
        query = torch.arange(self.block, device=device) + self.offset
        return (query[:, None] - torch.arange(self.extent, device=device)).abs()

    def singles(self) -> "tuple[Run, ...]":
        """Return the blocks as runs of one block each."""
        starts = (self.start + number * self.block for number in range(self.count))
        # not `replace`: torch 2.6 cannot compile it
        return tuple(Run(1, self.block, start, self.extent, self.offset, self.reach) for start in starts)

    @classmethod
    def whole(cls, size: int) -> "Run":
        """Return a single block in which every row reaches every row."""
        return cls(1, size, 0, size, 0, ((0, size),) * size)


Runs: TypeAlias = tuple[tuple[Run, ...], tuple[Run, ...]]
"""(runs of rows, runs of columns)."""


def cut(reach: Reach, block: int) -> tuple[Run, ...]:
    """Cut rows into blocks, and join equal consecutive blocks into runs."""
    runs: list[Run] = []
    for first in range(0, len(reach), block):
        rows = reach[first : first + block]
        start, end = rows[0][0], rows[-1][1]
        inside = tuple((low - start, high - start) for low, high in rows)
        run = Run(1, len(rows), start, end - start, first - start, inside)
        if runs and (runs[-1].block, runs[-1].offset, runs[-1].reach) == (run.block, run.offset, run.reach):
            run = Run(runs[-1].count + 1, run.block, runs[-1].start, run.extent, run.offset, run.reach)
            runs.pop()
        runs.append(run)
    return tuple(runs)


def plan(rows: Reach, columns: Reach) -> Runs | None:
    """Return the cheapest cut of a grid into blocks, or None if one call over all tokens is cheaper. Cached."""
    key = tuple(rows), tuple(columns)
    if torch.compiler.is_compiling():
        return _cheapest(*key)
    if key not in _plans:
        _plans[key] = _cheapest(*key)
    return _plans[key]


_plans: dict[tuple[Reach, Reach], Runs | None] = {}


def _cheapest(rows: Reach, columns: Reach) -> Runs | None:
    best, lowest = None, _MASKED * (len(rows) * len(columns)) ** 2
    for height, width in itertools.product(BLOCKS, (*BLOCKS, len(columns))):
        cuts = cut(rows, height), cut(columns, width)
        products, reached, calls = 1, 1, sum(run.count for run in cuts[0]) * len(cuts[1])
        for runs in cuts:
            products *= sum(run.count * run.block * run.extent for run in runs)
            reached *= sum(run.count * run.extent for run in runs)
        copied = len(rows) * sum(run.count * run.extent for run in cuts[1]) + len(rows) * len(columns)
        cost = _PRODUCT * products + _KEY * reached + _COPY * copied + _CALL * calls
        if cost < lowest:
            best, lowest = cuts, cost
    return best


def attend_in_blocks(
    parts_BhwHD: Sequence[Tensor],
    prefix_BHPD: Sequence[Tensor],
    runs: Runs,
    bias: Callable[[Run, Run], Tensor | None],
    p: float,
) -> Tensor:
    """Compute attention block by block.

    Args:
        parts_BhwHD: q, k and v.
        prefix_BHPD: keys and values of the prefix tokens, which every query also reaches; P may be 0.
        runs: the runs of rows and the runs of columns.
        bias: returns the bias of a region's logits, (Q, K) or (H, Q, K), or a bool mask, or None for no bias.
        p: dropout of the weights.

    Returns:
        (B, h, w, H, D)
    """
    q_BhwHD, *keys_BhwHD = parts_BhwHD
    rows, columns = tuple(single for run in runs[0] for single in run.singles()), runs[1]
    if torch.is_grad_enabled() and any(x.requires_grad for x in keys_BhwHD):
        reached = [iter(_Reached.apply(x, rows, columns)) for x in keys_BhwHD]
    else:
        reached = [_reached(x, rows, columns) for x in keys_BhwHD]
    stripes = []
    for column, stripe in zip(columns, q_BhwHD.split([run.count * run.block for run in columns], 2), strict=True):
        regions = []
        for row, region in zip(rows, stripe.split([run.block for run in rows], 1), strict=True):
            q_GHQD = region.unflatten(2, (column.count, column.block)).permute(0, 2, 4, 1, 3, 5)
            q_GHQD = q_GHQD.flatten(3, 4).flatten(0, 1)
            k_GHKD, v_GHKD = (_with(next(x), prefix) for x, prefix in zip(reached, prefix_BHPD, strict=True))
            added = bias(row, column)
            if added is not None:
                added = F.pad(added, (prefix_BHPD[0].shape[2], 0), value=True if added.dtype == torch.bool else 0.0)
            out_GHQD = attend(q_GHQD, k_GHKD, v_GHKD, added, p)
            out = out_GHQD.transpose(1, 2).unflatten(1, (row.block, column.block)).unflatten(0, (-1, column.count))
            regions.append(out.transpose(1, 2).flatten(2, 3))
        stripes.append(torch.cat(regions, 1) if len(regions) > 1 else regions[0])
    return torch.cat(stripes, 2) if len(stripes) > 1 else stripes[0]


def _reached(x_BhwHD: Tensor, rows: tuple[Run, ...], columns: tuple[Run, ...]) -> Iterator[Tensor]:
    """Yield the keys or values that each row of blocks reaches, (B · G, H, K, D), for one run of columns at a time.

    If two rows of blocks reach the same rows of keys, the columns that each block reaches are copied once, over the
    full height. Then every result is a view of this copy. Otherwise the keys or values of each row of blocks are copied
    when they are needed.
    """
    overlap = any(row.extent > row.block for row in rows)
    for run in columns:
        strip = x_BhwHD.narrow(2, run.start, (run.count - 1) * run.block + run.extent)
        strip = strip.unfold(2, run.extent, run.block).permute(0, 2, 3, 1, 5, 4)  # (B, strips, H, h, columns, D)
        if overlap and run.extent < x_BhwHD.shape[2]:
            strip = strip.contiguous()
        for row in rows:
            yield strip.narrow(3, row.start, row.extent).flatten(3, 4).flatten(0, 1)


class _Reached(torch.autograd.Function):
    """`_reached` with a backward pass that adds up overlapping gradients in place.

    The gradient of torch's `unfold` takes several times as long, and the gradient of a slice is as large as the whole
    tensor.
    """

    @staticmethod
    def forward(
        ctx: "_ReachedContext", x_BhwHD: Tensor, rows: tuple[Run, ...], columns: tuple[Run, ...]
    ) -> tuple[Tensor, ...]:
        ctx.shape, ctx.runs = x_BhwHD.shape, (rows, columns)
        return tuple(_reached(x_BhwHD, rows, columns))

    @staticmethod
    @once_differentiable
    def backward(ctx: "_ReachedContext", *grads_GHKD: Tensor) -> tuple[Tensor | None, ...]:
        rows, columns = ctx.runs
        batch, height, _, heads, width = ctx.shape
        grads = iter(grads_GHKD)
        total_BhwHD = grads_GHKD[0].new_zeros(ctx.shape)
        for run in columns:
            strip = total_BhwHD.new_zeros(batch, run.count, heads, height, run.extent, width)
            for row in rows:
                grad = next(grads).unflatten(2, (row.extent, run.extent)).unflatten(0, (batch, run.count))
                strip.narrow(3, row.start, row.extent).add_(grad)
            for first in range(0, run.extent, run.block):  # pieces no wider than a block do not overlap
                piece = strip[:, :, :, :, first : first + run.block]
                size = piece.shape[4]
                place = total_BhwHD.narrow(2, run.start + first, (run.count - 1) * run.block + size)
                place.unfold(2, size, run.block).add_(piece.permute(0, 3, 1, 2, 5, 4))
        return total_BhwHD, None, None


class _ReachedContext(Protocol):
    shape: torch.Size
    runs: Runs


def _with(x_GHKD: Tensor, prefix_BHPD: Tensor) -> Tensor:
    if not prefix_BHPD.shape[2]:
        return x_GHKD
    return torch.cat([prefix_BHPD.repeat_interleave(x_GHKD.shape[0] // prefix_BHPD.shape[0], 0), x_GHKD], 2)


def attend(q_BHQD: Tensor, k_BHKD: Tensor, v_BHKD: Tensor, bias: Tensor | None, p: float) -> Tensor:
    """Compute `scaled_dot_product_attention` with a bias, (Q, K) or (H, Q, K), that may require a gradient.

    If the bias requires a gradient, torch does not fuse attention and stores all weights. This function keeps the fused
    call, and computes the bias's gradient separately, a few images at a time.
    """
    bias = bias if bias is None else bias.expand(1, *(1,) * (3 - bias.ndim), *bias.shape)
    learned = bias is not None and bias.requires_grad and torch.is_grad_enabled()
    if not learned or p:
        return F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=bias, dropout_p=p)
    assert bias is not None
    out_BHQD = F.scaled_dot_product_attention(q_BHQD, k_BHKD, v_BHKD, attn_mask=bias.detach())
    return _BiasGradient.apply(out_BHQD, q_BHQD.detach(), k_BHKD.detach(), v_BHKD.detach(), bias)


class _BiasGradient(torch.autograd.Function):
    """Pass the output on unchanged, and compute the bias's gradient: ∂/∂bias = Σ_B A (dO vᵀ − rowsum(dO ⊙ O))."""

    @staticmethod
    def forward(
        ctx: Any, out: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor
    ) -> Tensor:  # torch's context is untyped
        ctx.save_for_backward(out, q, k, v, bias)
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *parts, bias = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)  # the gradient is a sum over many images
        total = torch.zeros_like(bias, dtype=wide)
        step = max(1, _TOGETHER // bias.expand(1, grad.shape[1], -1, -1).numel())
        for first in range(0, len(grad), step):
            dO, out, q, k, v = (x[first : first + step].to(wide) for x in (grad, *parts))
            weights = torch.softmax(q @ k.mT * q.shape[-1] ** -0.5 + bias.to(wide), -1)
            change = dO @ v.mT - (dO * out).sum(-1, keepdim=True)
            total += (weights * change).sum_to_size(total.shape)
        return grad, None, None, None, total.to(bias.dtype)
