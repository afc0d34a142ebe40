"""Attention rollout: how much of each patch reaches the class token through all layers.

Shapes: B images, W windows, H heads, Q queries, K keys.
"""

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture import Call, HeadMean, Interception, Site, Survey, Tokens, run
from visionattn.errors import UsageError, warn
from visionattn.maps import artefacts
from visionattn.maps.method import Explanation, Method, Target, check_fuse, fuse_heads, layers_source, require_attention


class Rollout(Method):
    """Attention rollout (Abnar & Zuidema 2020, 2005.00928, §3): the class token's row of Â_L Â_{L−1} … Â_1.

        Â = (A + I) / 2        A is the layer's attention with fused heads

    For transformers whose layers all attend to the same tokens (ViT, DeiT, BEiT …). If layers attend in windows or
    merge patches, the row is propagated across windows and merged patches, with a warning. Deviations from the paper:
    after fusing heads by max or min, each row is scaled to sum to one. With `discard`, which is not in the paper, the
    smallest weights of each row are dropped, and the row is again scaled to sum to one.

        >>> import timm, torch
        >>> vit = timm.create_model("test_vit", img_size=160)
        >>> Rollout()(vit, torch.rand(2, 3, 160, 160)).heatmaps.shape
        torch.Size([2, 10, 10])

    Args:
        fuse: how to fuse heads: by their mean, maximum or minimum.
        discard: fraction of the patches' weights to drop in each row, the smallest first, in [0, 1).

    Raises:
        UsageError: `fuse` is not mean, max or min, or discard is out of range.
    """

    name = "rollout"
    needs = "attention over positions"
    cost = "a forward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(survey.attention)

    def __init__(self, *, fuse: Literal["mean", "max", "min"] = "mean", discard: float = 0.0) -> None:
        check_fuse(fuse)
        if not 0 <= discard < 1:
            raise UsageError(f"discard must be in [0, 1), got {discard}")
        self.fuse, self.discard = fuse, discard

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        survey = require_attention(self.name, model, images_BCHW)
        sites = survey.attention
        check_chain(self.name, survey)
        with artefacts.warn_of_artefacts(model, survey), _Fused(model, len(sites), self.fuse, self.discard) as tape:
            output = run(model, images_BCHW)
        if not tape.layers:
            raise UsageError(
                "the model called no attention, although it did when it was surveyed; do not change the model while it "
                "is explained"
            )
        row = Row.start(tape.layers[-1][0], len(images_BCHW), images_BCHW.device)
        while tape.layers:
            site, weights_BWQK = tape.layers.pop()
            row = row.step(site, weights_BWQK, keep=0.5, add=0.5)
        return Explanation(row.grid_Bhw, output, None, layers_source(survey, len(survey.attention)))


class _Fused(Interception):
    """Keeps the attention of every layer, with fused heads. Of the last layer, it keeps only the class token's row."""

    def __init__(self, model: nn.Module, count: int, fuse: str, discard: float) -> None:
        super().__init__(model)
        self.count, self.fuse, self.discard = count, fuse, discard
        self.layers: list[tuple[Site, Tensor]] = []
        self._mean = HeadMean()

    @property
    def _last(self) -> bool:
        return len(self.layers) == self.count - 1

    def instead(self, call: Call) -> tuple[Tensor, Tensor] | None:
        if self.fuse != "mean" or (self._last and call.site.class_query is not None):
            return None
        return self._mean.instead(call)

    def attended(self, call: Call, out: Tensor, kept: Tensor | None) -> None:
        site = call.site
        if self._last and site.class_query is not None:
            index = slice(site.class_query, site.class_query + 1)
            weights = fuse_heads(call.rows(index), self.fuse, 2)
            site = class_row_only(site)
        elif self.fuse == "mean":
            weights = self._mean(call) if kept is None else kept
        else:
            weights = _extreme(call, self.fuse)
        if self.discard:
            first = 0 if site.windowed else site.num_prefix_tokens
            drop = int(self.discard * (weights.shape[-1] - first))
            low = weights[..., first:].topk(drop, -1, largest=False).indices + first
            weights.scatter_(-1, low, 0)
        if self.discard or self.fuse != "mean":
            weights /= weights.sum(-1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
        self.layers.append((site, weights))


def class_row_only(site: Site) -> Site:
    """Return the site with the class token as its only query, if it has a class token."""
    return replace(site, queries=None, class_query=0) if site.class_query == 0 else site


def _extreme(call: Call, fuse: str) -> Tensor:
    """Return the maximum or minimum of the weights over heads, (B, W, Q, K)."""
    batch, windows, _, queries, keys = call.shape
    out = call.zeros(batch, windows, queries, keys)
    for (b, w, heads), part_bwHQK in call.pieces():
        part_bwQK = part_bwHQK.amax(2) if fuse == "max" else part_bwHQK.amin(2)
        if heads.start == 0:
            out[b, w] = part_bwQK
        else:
            (torch.maximum if fuse == "max" else torch.minimum)(out[b, w], part_bwQK, out=out[b, w])
    return out


def check_chain(method: str, survey: Survey) -> None:
    """Warn if the layers do not all attend to the same tokens, or if some are not understood."""
    for caveat in chain_caveats(survey):
        warn(f"{method} {caveat}")


def chain_caveats(survey: Survey) -> list[str]:
    """Return why a product of all layers is approximate, as ends of sentences; an empty list if it is not."""
    sites, caveats = survey.attention, []
    if survey.unlabelled:
        name, reason = next(iter(survey.unlabelled.items()))
        used = layers_source(survey, len(sites))
        caveats.append(f"uses {used}, and its heatmaps are approximate; it leaves out {name}: {reason}")
    if any(site.windowed for site in sites):
        caveats.append(
            "assumes that every layer attends to all tokens, but some layers attend inside windows; its heatmaps are "
            "approximate"
        )
    elif len({site.grid for site in sites}) > 1 or any(
        s.queries is not None and s.queries.grid != s.grid for s in sites
    ):
        caveats.append(
            "assumes the same tokens in every layer, but this model merges or pools patches; its heatmaps are "
            "approximate"
        )
    return caveats


@dataclass
class Row:
    """One row of the product of the layers: the relevance of the prefix tokens (B, P) and of the grid (B, h, w)."""

    prefix_BP: Tensor  # noqa: N815
    grid_Bhw: Tensor  # noqa: N815

    @classmethod
    def start(cls, site: Site, batch: int, device: torch.device) -> "Row":
        """Return the row at the last layer: all relevance on its class token or, without one, evenly on its patches."""
        tokens = site.keys if site.queries is None else site.queries
        height, width = tokens.grid
        prefix = torch.zeros(batch, max(1, tokens.num_prefix_tokens), device=device, dtype=torch.float32)
        grid = torch.zeros(batch, height, width, device=device, dtype=torch.float32)
        if site.class_query is None:
            occupied = (tokens.counts(batch) > 0).float().to(device)
            grid += occupied / occupied.sum((1, 2), keepdim=True)
        else:
            prefix[:, site.class_query] = 1
        return cls(prefix, grid)

    def read(self, tokens: Tokens | None, count: int) -> Tensor:
        """Return the relevance of each token, (B, W, N).

        The relevance is 0 for padding, and for a token that stands for all dropped tokens.
        """
        if tokens is None:  # class tokens only, or learned queries
            return self._prefix(count)[:, None]
        cells = spread(self.grid_Bhw, tokens.grid)
        if tokens.in_order:
            return torch.cat([self._prefix(tokens.num_prefix_tokens), cells.flatten(1)], 1)[:, None]
        values = tokens.read(cells)
        first = tokens.num_prefix_tokens
        if first and not tokens.windowed:
            values[:, 0, :first] = self._prefix(first)
        return values

    def _prefix(self, count: int) -> Tensor:
        """Return the relevance of the first `count` prefix tokens, (B, count); 0 for tokens that the row lacks."""
        return F.pad(self.prefix_BP, (0, max(0, count - self.prefix_BP.shape[1])))[:, :count]

    def step(
        self, site: Site, weights_BWQK: Tensor, *, keep: float = 1.0, add: float = 1.0, normalise: bool = False
    ) -> "Row":
        """Return the row one layer earlier.

        row ← keep · row + add · row A
        row ← row (A + I)                 with `normalise`; the rows of A + I are first divided by their sums
        """
        if normalise:
            return self._scaled(site, 1 / (1 + weights_BWQK.sum(-1))).step(site, weights_BWQK)
        values = self.read(site.queries, weights_BWQK.shape[2])
        moved_BWK = torch.matmul(values[:, :, None], weights_BWQK)[:, :, 0]
        tokens = site.keys
        grid_Bhw = tokens.sum_to_grid(moved_BWK)
        prefix = torch.zeros_like(self.prefix_BP)
        first = 0 if tokens.windowed else min(tokens.num_prefix_tokens, prefix.shape[1])
        prefix[:, :first] = moved_BWK[:, 0, :first]
        sizes = [tuple(self.grid_Bhw.shape[1:]), tokens.grid, site.grid if site.queries is None else site.queries.grid]
        finer = max(sizes, key=lambda size: size[0] * size[1])  # the layer's input tokens lie on the finest grid
        return Row(
            keep * self.prefix_BP + add * prefix, keep * spread(self.grid_Bhw, finer) + add * spread(grid_Bhw, finer)
        )

    def _scaled(self, site: Site, factor_BWQ: Tensor) -> "Row":
        """Return the row with the relevance of each query multiplied by a factor."""
        tokens = site.queries
        if tokens is None:
            prefix = self.prefix_BP.clone()
            prefix[:, : factor_BWQ.shape[2]] *= factor_BWQ[:, 0, : prefix.shape[1]]
            return Row(prefix, self.grid_Bhw)
        prefix = self.prefix_BP.clone()
        if not tokens.windowed:
            first = min(tokens.num_prefix_tokens, prefix.shape[1])
            prefix[:, :first] *= factor_BWQ[:, 0, :first]
        return Row(prefix, spread(self.grid_Bhw, tokens.grid) * tokens.to_grid(factor_BWQ))


def spread(grid_Bhw: Tensor, size: tuple[int, ...]) -> Tensor:
    """Resample a grid to another size; the sum stays the same."""
    if tuple(grid_Bhw.shape[1:]) == tuple(size):
        return grid_Bhw
    before = grid_Bhw.sum((1, 2), keepdim=True)
    after = F.interpolate(
        grid_Bhw[:, None], size=tuple(size), mode="area" if size[0] < grid_Bhw.shape[1] else "nearest"
    )[:, 0]
    total = after.sum((1, 2), keepdim=True)
    return after * torch.where(total == 0, 0, before / torch.where(total == 0, 1, total))
