"""Carry one row of relevance back through the layers, so that no two N × N matrices are ever multiplied.

The class token's row of a product of attention maps, e_clsᵀ A_L … A_1, is a chain of vector–matrix products from the
last layer to the first. Between layers the row lies on the image: what comes before the grid (class and register
tokens), and the grid. So it passes windows, shifts, pooled keys and merged patches as well, with mass spread evenly
where cells split.

Shapes: B images, W windows, Q queries, K keys, P prefix tokens, h × w grid.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.maps.layout import Site, Tokens


@dataclass
class Row:
    """Relevance of the prefix tokens (B, P) and of the grid (B, h, w)."""

    prefix_BP: Tensor  # noqa: N815
    grid_Bhw: Tensor  # noqa: N815

    @classmethod
    def start(cls, site: Site, batch: int, device: torch.device) -> "Row":
        """All on the class token of the last layer; where there is none, evenly on the patches."""
        tokens = site.keys if site.queries is None else site.queries
        height, width = tokens.grid
        prefix = torch.zeros(batch, max(1, tokens.num_prefix_tokens), device=device, dtype=torch.float32)
        grid = torch.zeros(batch, height, width, device=device, dtype=torch.float32)
        if site.class_query is None:
            met = (tokens.counts(batch) > 0).float().to(device)
            grid += met / met.sum((1, 2), keepdim=True)
        else:
            prefix[:, site.class_query] = 1
        return cls(prefix, grid)

    def read(self, tokens: Tokens | None, count: int) -> Tensor:
        """Values of the tokens, (B, W, N), as `Tokens.read` has them.

        Padding, and a token made of those that were dropped, gets nothing.
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
        """The first prefix tokens, (B, count); 0 for those that the row does not have."""
        return F.pad(self.prefix_BP, (0, max(0, count - self.prefix_BP.shape[1])))[:, :count]

    def step(
        self, site: Site, weights_BWQK: Tensor, *, keep: float = 1.0, add: float = 1.0, normalise: bool = False
    ) -> "Row":
        """One layer back: row ← keep · row + add · row A; or row (A + I), whose rows are first divided by their
        sums."""
        if normalise:
            return self._scaled(site, 1 / (1 + weights_BWQK.sum(-1))).step(site, weights_BWQK)
        values = self.read(site.queries, weights_BWQK.shape[2])
        moved_BWK = torch.matmul(values[:, :, None], weights_BWQK)[:, :, 0]
        tokens = site.keys
        grid_Bhw = tokens.sum_to_grid(moved_BWK)
        prefix = torch.zeros_like(self.prefix_BP)
        first = 0 if tokens.windowed else min(tokens.num_prefix_tokens, prefix.shape[1])
        prefix[:, :first] = moved_BWK[:, 0, :first]
        sizes = [
            tuple(self.grid_Bhw.shape[1:]),
            tokens.grid,
            site.grid if site.queries is None else site.queries.grid,
        ]
        finer = max(sizes, key=lambda size: size[0] * size[1])  # what the layer reads lies on the finest of these
        return Row(
            keep * self.prefix_BP + add * prefix,
            keep * spread(self.grid_Bhw, finer) + add * spread(grid_Bhw, finer),
        )

    def _scaled(self, site: Site, factor_BWQ: Tensor) -> "Row":
        """Each token's value times a factor."""
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
    """Bring a grid to another size, each cell's mass spread evenly over the cells it covers."""
    if tuple(grid_Bhw.shape[1:]) == tuple(size):
        return grid_Bhw
    before = grid_Bhw.sum((1, 2), keepdim=True)
    after = F.interpolate(
        grid_Bhw[:, None], size=tuple(size), mode="area" if size[0] < grid_Bhw.shape[1] else "nearest"
    )[:, 0]
    total = after.sum((1, 2), keepdim=True)
    return after * torch.where(total == 0, 0, before / torch.where(total == 0, 1, total))
