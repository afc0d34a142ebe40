"""Attention at a few sampled places of several maps.

Shapes: B batch, Q queries, M heads, L maps, K points, C channels, h × w a map.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sampling(nn.Module):
    """Passes on where a deformable attention looks and how much each place weighs, so that whoever watches can hook it.

    Shape: places (B, Q, M, L, K, 2), x and y as shares of the image, and weights (B, Q, M, L, K), which sum to 1 over L
    and K.
    """

    def forward(self, places: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        return places, weights


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention (Zhu et al. 2020, 2010.04159, eq. 3), by bilinear sampling.

        out(z, box) = Σ_m W_m Σ_l Σ_k A_mlk(z) · W'_m x_l(centre + Δ_mlk(z) · size / 2K),    Σ_lk A_mlk = 1

    around a box rather than a point, with offsets that are measured in the box's size (their appendix A.4). Places
    outside of a map give 0. Where an image is no multiple of a map's stride, the map ends behind it, which `spans` tell
    (their valid ratios). Δ starts as K steps in M directions, A as uniform.

    Args:
        channels: C, a multiple of `heads`.
        levels: L.
        heads: M.
        points: K.

    Shape: queries (B, Q, C), boxes (B, Q, 4) as centre, width and height in shares of the image, L maps (B, C, h, w),
    and perhaps their spans (L, 2), width and height in shares of the image → (B, Q, C).
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
        turn_M = torch.arange(heads) * (2 * math.pi / heads)
        way_M2 = torch.stack([turn_M.cos(), turn_M.sin()], -1)
        way_M2 = way_M2 / way_M2.abs().amax(-1, keepdim=True)
        step_K = torch.arange(1, points + 1)
        start = way_M2[:, None, None] * step_K[None, None, :, None].expand(heads, levels, points, 1)
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
        reach_BQ2 = boxes_BQ4[..., 2:] / (2 * self.points)
        offsets_BQMLK2 = self.offsets(query_BQC).view(*shape, 2) * reach_BQ2[:, :, None, None, None]
        places_BQMLK2 = boxes_BQ4[:, :, None, None, None, :2] + offsets_BQMLK2
        places_BQMLK2, weights_BQMLK = self.sampling(places_BQMLK2, weights_BQMLK)
        if spans_L2 is not None:
            places_BQMLK2 = places_BQMLK2 / spans_L2[:, None]
        grid = (2 * places_BQMLK2 - 1).permute(3, 0, 2, 1, 4, 5).flatten(1, 2)  # (L, BM, Q, K, 2)
        weights = weights_BQMLK.permute(3, 0, 2, 1, 4).flatten(1, 2)[:, :, None]  # (L, BM, 1, Q, K)
        out = grid.new_zeros(batch * self.heads, channels // self.heads, count)
        for x_BChw, grid_NQK2, weights_N1QK in zip(maps, grid, weights, strict=True):
            value = self.value(x_BChw).reshape(batch * self.heads, channels // self.heads, *x_BChw.shape[2:])
            # places need more than the eight bits of bfloat16
            sampled = F.grid_sample(value.to(grid_NQK2.dtype), grid_NQK2, align_corners=False)  # (BM, C/M, Q, K)
            out = out + (sampled * weights_N1QK).sum(-1)
        return self.project(out.view(batch, channels, count).mT)
