"""Deformable attention: a weighted sum of a few sampled points of several feature maps.

Shapes: B batch, Q queries, M heads, L feature maps, K points, C channels, h × w the size of a map.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sampling(nn.Module):
    """Return the sampling points and weights of a deformable attention unchanged, as a module that `capture` can hook.

    Shape: points (B, Q, M, L, K, 2), x and y as fractions of the image, and weights (B, Q, M, L, K), which sum to 1
    over L and K.
    """

    def forward(self, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return places, weights


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2020, 2010.04159, eq. 3), by bilinear sampling.

        out(z, box) = Σ_m W_m Σ_l Σ_k A_mlk(z) · W'_m x_l(centre + Δ_mlk(z) · size / 2K),    Σ_lk A_mlk = 1

    The points are sampled around a box rather than a point, with offsets in units of the box's size (the paper's
    appendix A.4). Points outside a map give 0. If an image's side is not a multiple of a map's stride, the map extends
    beyond the image; `spans` then gives the map's size relative to the image (the inverse of Deformable DETR's valid
    ratios). At initialisation, A is uniform, and each head has its own direction: the head's k-th point lies k steps in
    this direction.

    Args:
        channels: C, a multiple of `heads`.
        levels: L.
        heads: M (default: 8).
        points: K (default: 4).

    Raises:
        ValueError: channels is not a multiple of heads.

    Shape: queries (B, Q, C); boxes (B, Q, 4) as centre, width and height in fractions of the image; L maps (B, C, h,
    w); optionally their spans (L, 2), width and height in fractions of the image → (B, Q, C).
    """

    def __init__(self, channels: int, *, levels: int, heads: int = 8, points: int = 4) -> None:
        super().__init__()
        if channels % heads:
            raise ValueError(f"channels must be a multiple of heads, got {channels} and {heads}")
        self.levels, self.heads, self.points = levels, heads, points
        self.offsets = nn.Linear(channels, heads * levels * points * 2)
        self.weigh = nn.Linear(channels, heads * levels * points)
        self.value = nn.Conv2d(channels, channels, 1)
        self.sampling = Sampling()
        self.project = nn.Linear(channels, channels)
        angle_M = torch.arange(heads) * (2 * math.pi / heads)
        direction_M2 = torch.stack([angle_M.cos(), angle_M.sin()], -1)
        direction_M2 = direction_M2 / direction_M2.abs().amax(-1, keepdim=True)
        step_K = torch.arange(1, points + 1)
        start = direction_M2[:, None, None] * step_K[None, None, :, None].expand(heads, levels, points, 1)
        nn.init.zeros_(self.offsets.weight)
        nn.init.zeros_(self.weigh.weight)
        nn.init.zeros_(self.weigh.bias)
        self.offsets.bias = nn.Parameter(start.flatten().clone())

    def forward(
        self, query_BQC: Tensor, boxes_BQ4: Tensor, maps: Sequence[Tensor], spans_L2: Tensor | None = None
    ) -> Tensor:
        batch, count, channels = query_BQC.shape
        shape = batch, count, self.heads, self.levels, self.points
        weights_BQMLK = self.weigh(query_BQC).view(batch, count, self.heads, -1).softmax(-1).view(shape)
        unit_BQ2 = boxes_BQ4[..., 2:] / (2 * self.points)
        offsets_BQMLK2 = self.offsets(query_BQC).view(*shape, 2) * unit_BQ2[:, :, None, None, None]
        points_BQMLK2 = boxes_BQ4[:, :, None, None, None, :2] + offsets_BQMLK2
        points_BQMLK2, weights_BQMLK = self.sampling(points_BQMLK2, weights_BQMLK)
        if spans_L2 is not None:
            points_BQMLK2 = points_BQMLK2 / spans_L2[:, None]
        grid = (2 * points_BQMLK2 - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, BM, Q, K, 2)
        weights = weights_BQMLK.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, BM, 1, Q, K)
        out = grid.new_zeros(batch * self.heads, channels // self.heads, count)
        for x_BChw, grid_NQK2, weights_N1QK in zip(maps, grid, weights, strict=True):
            value = self.value(x_BChw).reshape(batch * self.heads, channels // self.heads, *x_BChw.shape[2:])
            # coordinates need more than the eight bits of bfloat16
            sampled = F.grid_sample(value.to(grid_NQK2.dtype), grid_NQK2, align_corners=False)  # (BM, C/M, Q, K)
            out = out + (sampled * weights_N1QK).sum(-1)
        return self.project(out.view(batch, channels, count).mT)
