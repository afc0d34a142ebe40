"""What is kept of each call of attention, computed from queries and keys beside the fused call.

Shapes: B images, W windows, H heads, Q queries, K keys, D channels of a head.
"""

import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from visionattn.capture.token_layout import Site

# Weights computed at a time, float32: images are taken together up to 4 MB, since small calls use no two threads and
# memory beyond the model's own would be mapped anew by every layer; heads are split beyond 24 MB.
_TOGETHER, _MOST = 1_000_000, 6_000_000

Piece: TypeAlias = "tuple[slice, slice, slice]"
"""Some images, windows and heads."""


@dataclass(frozen=True)
class Call:
    """A call of attention in flight.

    Attributes:
        site: where, and how its tokens lie.
        query, key, value: (B, W, H, Q, D) and (B, W, H, K, D); None where the model attends eagerly.
        bias: added to the logits: an additive mask, broadcast to (B, W, H, Q, K), or None.
        scale: of the logits.
        weights: (B, W, H, Q, K) as the model computed them; None where the call is fused.
        dropout: of the weights, while training.
        differentiable: the call's output is part of a graph.
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
    def fused(cls, site: Site, args: tuple[Any, ...], kwargs: dict[str, Any]) -> "Call":
        """Read the arguments of `F.scaled_dot_product_attention`."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given = dict(zip(names, args, strict=False)) | kwargs
        query, key, value = (given[name].detach() for name in names[:3])
        parts = [given[name] for name in names[:4] if given.get(name) is not None]
        differentiable = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
        groups = query.shape[-3] // key.shape[-3] if given.get("enable_gqa") else 1
        if groups > 1:
            key, value = key.repeat_interleave(groups, -3), value.repeat_interleave(groups, -3)
        if key.shape[:-2] != query.shape[:-2]:  # one key for all heads
            key, value = (part.expand(*query.shape[:-2], *part.shape[-2:]) for part in (key, value))
        scale = given.get("scale")
        mask = given.get("attn_mask")
        if given.get("is_causal"):
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
            dropout=given.get("dropout_p", 0.0),
            differentiable=differentiable,
        )

    @classmethod
    def eager(cls, site: Site, weights: Tensor) -> "Call":
        """Take the weights that a softmax returned."""
        weights = weights.movedim(site.axis, -1) if site.axis is not None else weights
        weights = weights.unsqueeze(-2) if site.context else weights
        return cls(site, weights=site.canonical(weights))

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """(B, W, H, Q, K)"""
        if self.weights is not None:
            return tuple(self.weights.shape)  # type: ignore[return-value]
        assert self.query is not None
        assert self.key is not None
        return (*self.query.shape[:4], self.key.shape[3])

    def rows(self, queries: slice | Tensor) -> Tensor:
        """Weights of some queries, (B, W, H, those, K), float32."""
        if self.weights is not None:
            # a copy: the model may go on in place, and a view would keep all weights alive
            return self.weights[:, :, :, queries].detach().to(torch.float32, copy=True)
        assert self.query is not None
        assert self.key is not None
        logits = products(self.query[:, :, :, queries].float(), self.key.float())
        logits *= self.scale
        return _softmax(logits, None if self.bias is None else self.bias[:, :, :, queries])

    def pieces(self, out: Tensor | None = None) -> "Iterator[tuple[Piece, Tensor]]":
        """Go through all weights in pieces: the slices of images, windows and heads, and their weights (b, w, h, Q, K).

        The weights' buffer is used again for the next piece. Where all weights are needed and `out` is given, the
        attention's own output is made of them on the way, so that the fused call need not compute them once more.
        """
        batch, windows, heads, queries, keys = self.shape
        some_heads = min(heads, max(1, _MOST // (queries * keys)))
        room = _TOGETHER // (heads * queries * keys)
        some_windows = min(windows, max(1, room))
        some_images = max(1, min(batch, room // windows))  # of an empty batch there are no pieces
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
        """Room for the attention's output, (B, W, H, Q, D), laid out as the fused call's; None to leave it to that
        call.

        Only in float32 and where nothing needs its gradient; there the two agree to rounding.
        """
        if self.value is None or self.query is None or self.dropout or self.site.windowed or self.site.lead[0] != 1:
            return None
        dtypes = {part.dtype for part in (self.query, self.key, self.value) if part is not None}
        if len(self.site.lead) != 2 or dtypes != {torch.float32} or self.differentiable:
            return None
        batch, _, heads, queries, _ = self.query.shape
        return self.value.new_empty(batch, 1, queries, heads, self.value.shape[-1]).transpose(2, 3)

    def new(self, *shape: int) -> Tensor:
        """Room for float32 values on the device of the call."""
        like = self.weights if self.weights is not None else self.query
        assert like is not None
        return torch.empty(shape, device=like.device, dtype=torch.float32)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros, float32, on the device of the call."""
        return self.new(*shape).zero_()


def products(a_BWHQD: Tensor, b_BWHKD: Tensor) -> Tensor:
    """a bᵀ, (B, W, H, Q, K).

    Where one query meets keys that lie token by token, as a ViT's do, a product head by head would copy all keys first.
    So the tokens are multiplied as they lie, (K, H·D), by a matrix (H·D, H) whose column h holds the query of head h.
    """
    heads, queries, width = a_BWHQD.shape[2:]
    if queries != 1 or b_BWHKD.stride()[2::2] != (width, 1):
        return a_BWHQD @ b_BWHKD.mT
    columns = (a_BWHQD.mT * torch.eye(heads, device=a_BWHQD.device, dtype=a_BWHQD.dtype)[:, None]).flatten(2, 3)
    return (b_BWHKD.transpose(2, 3).flatten(3) @ columns).mT[:, :, :, None]


def _softmax(logits: Tensor, bias: Tensor | None) -> Tensor:
    """softmax(logits + bias) over keys, in place; 0 for a query that may attend to none, as the fused call has it."""
    if bias is not None:
        logits += bias
    if torch.compiler.is_compiling():  # `out=` would tie a graph to this number of images
        logits = torch.softmax(logits, -1)
    else:
        torch.softmax(logits, -1, out=logits)
    return logits if bias is None else logits.masked_fill_(bias.isneginf().all(-1, keepdim=True), 0)


def _slices(count: int, step: int) -> list[slice]:
    return [slice(start, min(start + step, count)) for start in range(0, count, step)]


class Keep(ABC):
    """Says what to keep of a call."""

    @abstractmethod
    def __call__(self, call: Call) -> Tensor | None:
        """Compute it; None to keep the fact that there was attention, and no weights."""

    def instead(self, call: Call) -> tuple[Tensor, Tensor] | None:
        """Compute it together with the attention's output (B, W, H, Q, D), in place of the fused call; None to leave
        that be."""
        return None


class Nothing(Keep):
    """Keep no weights: who attends, and how."""

    def __call__(self, call: Call) -> None:
        return None


class Full(Keep):
    """Every weight, (B, W, H, Q, K)."""

    def __call__(self, call: Call) -> Tensor:
        return call.rows(slice(None))


class HeadMean(Keep):
    """The mean over heads, (B, W, Q, K).

    Where it can, it computes the attention's output from the same weights, in place of the fused call; the two differ
    by rounding.
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
        for (b, w, some), part_bwHQK in call.pieces(out):
            if some.start == 0:
                torch.sum(part_bwHQK, 2, out=mean[b, w])
            else:
                mean[b, w] += part_bwHQK.sum(2)
        return mean.mul_(1 / heads)


class ClassRow(Keep):
    """What the class token attends to, (B, W, H, K); where there is none, the mean over the patches of each window."""

    def __call__(self, call: Call) -> Tensor:
        index = call.site.class_query
        if index is not None:
            return call.rows(slice(index, index + 1))[:, :, :, 0]
        batch, windows, heads, _, keys = call.shape
        first = call.site.queries.num_prefix_tokens if call.site.queries else 0  # registers are no patches
        out = call.zeros(batch, windows, heads, keys)
        for piece, part_bwHQK in call.pieces():
            out[piece] = part_bwHQK[:, :, :, first:].mean(3)
        return out


class PatchRow(Keep):
    """What one patch attends to, (B, W, H, K); 0 in the windows where that patch is not.

    Args:
        row, column: of the patch on the grid of the queries.
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
        here_BWQ = call.site.queries.of_cell(self.row * width + self.column, batch)
        for window, query in here_BWQ.any(0).nonzero().tolist() if batch else ():
            share_B = here_BWQ[:, window, query] / here_BWQ.sum((1, 2)).clamp(min=1)
            rows_BHK = call.rows(slice(query, query + 1))[:, window, :, 0]
            out[:, window] += rows_BHK * share_B.to(rows_BHK.device)[:, None, None]
        return out
