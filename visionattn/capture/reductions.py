"""Reductions compute from the queries and keys of a call of attention the part of its weights that is kept.

Shapes: B images, W windows, H heads, Q queries, K keys, D channels of a head.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from visionattn.capture.hooks import Args, Kwargs
from visionattn.capture.token_layout import Site

# Largest numbers of float32 weights to compute at a time. Images and windows are computed together up to 4 MB:
# computing fewer at a time would use only one thread, and for more, the system would have to provide new memory pages
# in every layer. The heads of one window are split above 24 MB.
_TOGETHER, _MOST = 1_000_000, 6_000_000

Piece: TypeAlias = "tuple[slice, slice, slice]"
"""Slices of images, windows and heads."""


@dataclass(frozen=True)
class Call:
    """A running call of attention.

    Attributes:
        site: the site of the call, with the positions of its tokens.
        query, key, value: (B, W, H, Q, D) and (B, W, H, K, D); None if the model calls softmax itself.
        bias: additive mask of the logits, broadcast to (B, W, H, Q, K), or None.
        scale: factor of the logits.
        weights: (B, W, H, Q, K), computed by the model; None if the call is fused.
        dropout: dropout probability of the weights.
        differentiable: whether the call's output is part of an autograd graph.
    """

    site: Site
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None
    scale: float = 1.0
    weights: Tensor | None = None
    dropout: float = 0.0
    differentiable: bool = False

    @classmethod
    def fused(cls, site: Site, args: Args, kwargs: Kwargs) -> "Call":
        """Make a `Call` from the arguments of `F.scaled_dot_product_attention`."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        arguments = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = (arguments[name].detach() for name in names[:3])
        parts = [arguments[name] for name in names[:4] if arguments.get(name) is not None]
        differentiable = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        groups = query.shape[-3] // key.shape[-3] if arguments.get("enable_gqa") else 1
        if groups > 1:
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        if key.shape[:-2] != query.shape[:-2]:  # one key for all heads
            key, value = (part.expand(*query.shape[:-2], *part.shape[-2:]) for part in (key, value))
        scale = arguments.get("scale")
        mask = arguments.get("attn_mask")
        if arguments.get("is_causal"):
            mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
        bias = None
        if mask is not None:
            mask = mask.detach()
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, -math.inf)
            bias = site.canonical(mask.expand(*query.shape[:-1], key.shape[-2]))
        return cls(
            site,
            query=site.canonical(query),
            key=site.canonical(key),
            value=site.canonical(value),
            bias=bias,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            dropout=arguments.get("dropout_p", 0.0),
            differentiable=differentiable,
        )

    @classmethod
    def eager(cls, site: Site, weights: Tensor) -> "Call":
        """Make a `Call` from the weights that a softmax returned."""
        weights = weights.movedim(site.axis, -1) if site.axis is not None else weights
        weights = weights.unsqueeze(-2) if site.context else weights
        return cls(site, weights=site.canonical(weights))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """The shape of the weights, (B, W, H, Q, K)."""
        if self.weights is not None:
            batch, windows, heads, queries, keys = self.weights.shape
            return batch, windows, heads, queries, keys
        assert self.query is not None
        assert self.key is not None
        return (*self.query.shape[:4], self.key.shape[3])

    def rows(self, queries: slice | Tensor) -> Tensor:
        """Return the weights of a selection of Q queries, (B, W, H, Q, K) float32."""
        if self.weights is not None:
            # a copy, since the model may change its weights in place, and a view would keep all weights in memory
            return self.weights[:, :, :, queries].detach().to(torch.float32, copy=True)
        assert self.query is not None
        assert self.key is not None
        logits = products(self.query[:, :, :, queries].float(), self.key.float())
        logits *= self.scale
        return _softmax(logits, None if self.bias is None else self.bias[:, :, :, queries])

    def pieces(self, out: Tensor | None = None) -> "Iterator[tuple[Piece, Tensor]]":
        """Iterate over all weights in pieces: slices of images, windows and heads, and their weights (b, w, h, Q, K).

        The weights of each piece overwrite the weights of the piece before.

        Args:
            out: a tensor (B, W, H, Q, D) to fill with the attention's output, so that the fused call need not run.
        """
        batch, windows, heads, queries, keys = self.shape
        some_heads = min(heads, max(1, _MOST // (queries * keys)))
        room = _TOGETHER // (heads * queries * keys)
        some_windows = min(windows, max(1, room))
        some_images = max(1, min(batch, room // windows))  # at least 1, also for an empty batch
        buffer = None
        for piece in itertools.product(
            _slices(batch, some_images), _slices(windows, some_windows), _slices(heads, some_heads)
        ):
            if self.weights is not None:
                yield piece, self.weights[piece].detach().float()
                continue
            assert self.query is not None
            assert self.key is not None
            query = self.query[piece].float()
            query_nQD, key_nKD = query.flatten(0, 2), self.key[piece].float().flatten(0, 2)
            if buffer is None:
                buffer = query.new_empty(len(query_nQD), queries, keys)
            part_nQK = buffer[: len(query_nQD)]
            torch.baddbmm(part_nQK, query_nQD, key_nKD.mT, beta=0, alpha=self.scale, out=part_nQK)
            part = part_nQK.view(*query.shape[:4], keys)
            _softmax(part, None if self.bias is None else self.bias[piece])
            if out is not None:
                assert self.value is not None
                out[piece] = torch.bmm(part_nQK, self.value[piece].flatten(0, 2)).view(*query.shape[:4], -1)
            yield piece, part

    def output(self) -> Tensor | None:
        """Return an empty tensor for the attention's output, (B, W, H, Q, D), with the strides of the fused output.

        Return None if the fused call must run: with dropout, windows or gradients, or in a dtype other than float32.
        In the other cases, an output computed from `pieces` differs from the fused output only by rounding.
        """
        if self.value is None or self.query is None or self.dropout or self.site.windowed or self.site.lead[0] != 1:
            return None
        dtypes = {part.dtype for part in (self.query, self.key, self.value) if part is not None}
        if len(self.site.lead) != 2 or dtypes != {torch.float32} or self.differentiable:
            return None
        batch, _, heads, queries, _ = self.query.shape
        return self.value.new_empty(batch, 1, queries, heads, self.value.shape[-1]).transpose(2, 3)

    def new(self, *shape: int) -> Tensor:
        """Return an empty float32 tensor on the device of the call."""
        like = self.weights if self.weights is not None else self.query
        assert like is not None
        return torch.empty(shape, device=like.device, dtype=torch.float32)

    def zeros(self, *shape: int) -> Tensor:
        """Return a float32 tensor of zeros on the device of the call."""
        return self.new(*shape).zero_()


def products(a_BWHQD: Tensor, b_BWHKD: Tensor) -> Tensor:
    """Return the products a bᵀ, (B, W, H, Q, K).

    For a single query, the keys (K, H·D) are multiplied by a matrix (H·D, H) that has the query of head h in column h.
    One product for each head would first copy all keys, because a ViT stores its keys token by token.
    """
    heads, queries, width = a_BWHQD.shape[2:]
    if queries != 1 or b_BWHKD.stride()[2::2] != (width, 1):
        return a_BWHQD @ b_BWHKD.mT
    columns = (a_BWHQD.mT * torch.eye(heads, device=a_BWHQD.device, dtype=a_BWHQD.dtype)[:, None]).flatten(2, 3)
    return (b_BWHKD.transpose(2, 3).flatten(3) @ columns).mT[:, :, :, None]


def _softmax(logits: Tensor, bias: Tensor | None) -> Tensor:
    """Compute softmax(logits + bias) over keys in place; as in fused calls, 0 if all keys of a query are masked."""
    if bias is not None:
        logits += bias
    if torch.compiler.is_compiling():  # `out=` would fix the batch size of a compiled or exported graph
        logits = torch.softmax(logits, -1)
    else:
        torch.softmax(logits, -1, out=logits)
    return logits if bias is None else logits.masked_fill_(bias.isneginf().all(-1, keepdim=True), 0)


def _slices(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class Reduction(ABC):
    """Base class of reductions: a reduction computes the weights to keep of a call of attention."""

    @abstractmethod
    def __call__(self, call: Call) -> Tensor | None:
        """Return the weights to keep, float32; None to make a record without weights."""

    def instead(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """Compute the weights to keep and the attention's output (B, W, H, Q, D), in place of the fused call.

        Returns:
            The weights and the output; None to run the fused call.
        """
        return None


class NoWeights(Reduction):
    """Keep no weights: records hold only the names of modules and the positions of queries and keys."""

    def __call__(self, call: Call) -> None:
        return None


class FullAttention(Reduction):
    """Keep every weight, (B, W, H, Q, K)."""

    def __call__(self, call: Call) -> Tensor:
        return call.rows(slice(None))


class HeadMean(Reduction):
    """Keep the mean over heads, (B, W, Q, K).

    If possible, the attention's output is computed from the same weights in place of the fused call. The two outputs
    differ by rounding.
    """

    def __call__(self, call: Call) -> Tensor:
        return self._mean(call, None)

    def instead(self, call: Call) -> tuple[Tensor, Tensor] | None:
        out = call.output()
        return None if out is None else (self._mean(call, out), out)

    @staticmethod
    def _mean(call: Call, out: Tensor | None) -> Tensor:
        batch, windows, heads, queries, keys = call.shape
        mean = call.new(batch, windows, queries, keys)
        for (b, w, chunk), part_bwHQK in call.pieces(out):
            if chunk.start == 0:
                torch.sum(part_bwHQK, 2, out=mean[b, w])
            else:
                mean[b, w] += part_bwHQK.sum(2)
        return mean.mul_(1 / heads)


class ClassRow(Reduction):
    """Keep the class token's row, (B, W, H, K); without a class token, the mean over the patches of each window."""

    def __call__(self, call: Call) -> Tensor:
        index = call.site.class_query
        if index is not None:
            return call.rows(slice(index, index + 1))[:, :, :, 0]
        batch, windows, heads, _, keys = call.shape
        first = call.site.queries.num_prefix_tokens if call.site.queries else 0  # leaves out register tokens
        out = call.zeros(batch, windows, heads, keys)
        for piece, part_bwHQK in call.pieces():
            out[piece] = part_bwHQK[:, :, :, first:].mean(3)
        return out


class PatchRow(Reduction):
    """Keep the row of one patch, (B, W, H, K); 0 in windows without that patch.

    Calls whose queries have no grid, or a grid without that patch, get a record without weights.

    Args:
        row, column: position of the patch on the grid of the queries.
    """

    def __init__(self, row: int, column: int) -> None:
        self.row, self.column = row, column

    def __call__(self, call: Call) -> Tensor | None:
        if call.site.queries is None:
            return None
        height, width = call.site.queries.grid
        if not (0 <= self.row < height and 0 <= self.column < width):
            return None
        batch, windows, heads, _, keys = call.shape
        out = call.zeros(batch, windows, heads, keys)
        in_cell_BWQ = call.site.queries.of_cell(self.row * width + self.column, batch)
        for window, query in in_cell_BWQ.any(0).nonzero().tolist() if batch else ():
            share_B = in_cell_BWQ[:, window, query] / in_cell_BWQ.sum((1, 2)).clamp(min=1)
            rows_BHK = call.rows(slice(query, query + 1))[:, window, :, 0]
            out[:, window] += rows_BHK * share_B.to(rows_BHK.device)[:, None, None]
        return out
