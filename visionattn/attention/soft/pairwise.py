"""Attention between positions: weights (B, heads, positions, positions), over the whole feature map or in blocks.

Shapes: B batch, C channels, H rows, W columns, N = H · W positions, D channels of a head.
"""

import torch
import torch.nn.functional as F
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.layers.non_local_attn import BatNonLocalAttn, NonLocalAttn
from torch import Tensor, nn

from visionattn.attention.soft.channel import _bottleneck, _divisor


class NonLocal(nn.Module):
    """Non-local block, embedded Gaussian (Wang et al. 2018, 1711.07971, eq. 1, 4 and 6), with timm's weights.

        y   = softmax(q kᵀ / √C) v                      q, k, v = W_q x, W_k x, W_v x
        out = x + BN(W_z y)

    The scale of BN starts at 0, where the module is the identity. Attention runs in one fused call; timm's own forward
    pass stores the N × N map. Deviation from the paper: scores are divided by √C, as in timm.

    Args:
        channels: C of the input.
        reduction: C divided by the width of q, k and v; the width is at least 1 (default: 8).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        self.attention = NonLocalAttn(channels, rd_channels=_bottleneck(channels, reduction))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block = self.attention
        q, k, v = (_tokens(project(x_BCHW)) for project in (block.t, block.p, block.g))
        y = F.scaled_dot_product_attention(q, k, v, scale=block.scale)
        return x_BCHW + block.norm(block.z(_plane(y, x_BCHW)))


class DualAttention(nn.Module):
    """Dual attention of DANet (Fu et al. 2019, 1809.02983, eq. 1–4): over positions and over channels.

        out = x + alpha · softmax(q kᵀ) v + beta · softmax(x xᵀ) x

    The first softmax is over positions, with q, k, v = W_q x, W_k x, W_v x. The second is over channels, with x
    reshaped to (C, N). alpha and beta start at 0, where the module is the identity. Deviations from the paper: both
    branches use x itself and are added, without the convolutions before and after each branch. The authors' code
    prefers the least similar channels, by softmax(max − x xᵀ); this module follows the equation.

    Args:
        channels: C of the input.
        reduction: C divided by the width of q and k; the width is at least 1 (default: 8).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        width = _bottleneck(channels, reduction)
        self.query = nn.Conv2d(channels, width, 1)
        self.key = nn.Conv2d(channels, width, 1)
        self.value = nn.Conv2d(channels, channels, 1)
        self.alpha = nn.Parameter(torch.zeros(1))
        self.beta = nn.Parameter(torch.zeros(1))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        q, k, v = (_tokens(project(x_BCHW)) for project in (self.query, self.key, self.value))
        over_positions = _plane(F.scaled_dot_product_attention(q, k, v, scale=1.0), x_BCHW)
        x_BCN = x_BCHW.flatten(2)
        over_channels = ((x_BCN @ x_BCN.transpose(1, 2)).softmax(-1) @ x_BCN).view_as(x_BCHW)
        return x_BCHW + self.alpha * over_positions + self.beta * over_channels


class BottleneckAttention(nn.Module):
    """Self-attention of bottleneck transformers (Srinivas et al. 2021, 2101.11605, fig. 4), with timm's weights.

        out = softmax(q kᵀ / √D + q r_hᵀ + q r_wᵀ) v            q, k, v = W x, in heads of D channels

    r_h and r_w are learned for every distance along rows and columns. The module replaces a 3 × 3 convolution, so it
    has no shortcut. timm's module accepts one image size only. Here r_h and r_w are learned for a `size` × `size` map,
    and interpolated linearly for other sizes, with the largest distances aligned. Deviations from the paper: this
    interpolation; q r is not divided by √D, as in the authors' code.

    Args:
        channels: C of the input.
        num_heads: number of heads (default: the greatest common divisor of C and 4).
        size: rows and columns of the map for which r_h and r_w are learned (default: 14).

    Raises:
        ValueError: size is < 1.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, num_heads: int | None = None, size: int = 14) -> None:
        super().__init__()
        if size < 1:
            raise ValueError(f"size must be ≥ 1, got {size}")
        heads = _divisor(channels, num_heads, 4, "num_heads")
        self.attention = BottleneckAttn(channels, feat_size=(size, size), num_heads=heads)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block, (height, width) = self.attention, x_BCHW.shape[2:]
        sizes = [block.dim_out_qk, block.dim_out_qk, block.dim_out_v]
        q, k, v = (_tokens(part, block.num_heads) for part in block.qkv(x_BCHW).split(sizes, 1))
        q_BNHWD = q.unflatten(2, (height, width))
        rows = torch.einsum("bnhwd,hyd->bnhwy", q_BNHWD, _distances(block.pos_embed.height_rel, height))
        columns = torch.einsum("bnhwd,wxd->bnhwx", q_BNHWD, _distances(block.pos_embed.width_rel, width))
        bias = (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)
        return _plane(F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=block.scale), x_BCHW)


class BilinearAttention(nn.Module):
    """Bilinear attentional transform, BAT (Chi et al. 2020, CVPR, eq. 4–7), with timm's weights.

        y   = P x' Q                            for each group of channels of x' = relu(BN(W_1 x)); rows, then columns
        out = x + dropout(relu(BN(W_3 relu(BN(W_2 y)))))

    The image is cut into s rows and s columns of blocks, and P and Q are s × s. Position (i, j) of a block attends
    first to position (i, j) of all blocks in the same column, then to that of all blocks in the same row. P is computed
    from the maximum of each row of blocks and Q from the maximum of each column of blocks: by a projection, a sigmoid,
    and division by the sum over the attended blocks. Deviation from the paper, as in timm: P and Q are computed from
    these maxima instead of all of x. If the sides of an image are not multiples of s, its last row and column are
    repeated; timm's module rejects such an image.

    Args:
        channels: C of the input.
        block_size: s, the number of blocks along each side; the name is timm's (default: 7, as in the authors' code).
        groups: groups of channels, each with its own P and Q (default: 2).
        reduction: C divided by the channels of x', which are rounded up to a multiple of `groups` (default: 4).
        drop_rate: dropout of whole channels in training (default: 0.2).

    Raises:
        ValueError: block_size or groups is < 1.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(
        self, channels: int, *, block_size: int = 7, groups: int = 2, reduction: int = 4, drop_rate: float = 0.2
    ) -> None:
        super().__init__()
        if block_size < 1 or groups < 1:
            raise ValueError(f"block_size and groups must be ≥ 1, got {block_size} and {groups}")
        width = -(-_bottleneck(channels, reduction) // groups) * groups
        self.attention = BatNonLocalAttn(
            channels, block_size=block_size, groups=groups, rd_channels=width, drop_rate=drop_rate
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block, (height, width) = self.attention, x_BCHW.shape[2:]
        size, groups = block.ba.block_size, block.ba.groups
        inner = _continued(_continued(block.conv1(x_BCHW), 2, size), 3, size)
        guide = block.ba.conv1(inner)
        # sigmoids divided by their sum are the softmax of their logarithms; indices: g groups, s and t blocks
        rows_Bgst = block.ba.conv_p(guide.unflatten(2, (size, -1)).amax((3, 4))[..., None])
        columns_Bgst = block.ba.conv_q(guide.unflatten(3, (size, -1)).amax((2, 4))[:, :, None])
        rows_Bgst = F.softmax(F.logsigmoid(rows_Bgst.view(-1, groups, size, size)), 3)
        columns_Bgst = F.softmax(F.logsigmoid(columns_Bgst.view(-1, groups, size, size)), 2)
        y = inner.unflatten(1, (groups, -1))
        y = rows_Bgst[:, :, None] @ y.unflatten(3, (size, -1)).flatten(4)  # (B, g, R, s, rest of the rows · W)
        y = y.view(*y.shape[:4], -1, inner.shape[3]).flatten(3, 4).unflatten(4, (size, -1))  # (B, g, R, H, s, rest)
        y = torch.einsum("bgrhsu,bgst->bgrhtu", y, columns_Bgst).flatten(4).flatten(1, 2)
        y = block.conv2(block.ba.conv2(y[:, :, :height, :width]))
        return x_BCHW + block.dropout(y)


class HaloAttention(nn.Module):
    """Blocked local self-attention with haloes (Vaswani et al. 2021, 2103.12731, fig. 2), by timm's module.

        out = softmax(q kᵀ / √D + q r_hᵀ + q r_wᵀ) v            q of a block; k, v of the block and a halo around it

    r_h and r_w are learned for every distance along rows and columns. The module replaces a 3 × 3 convolution, so it
    has no shortcut. The image is padded with zeros, and positions attend to these zeros, as in the paper's code. If the
    sides of an image are not multiples of the block, they are padded with zeros too; timm's module rejects such an
    image. Deviations from the paper: none.

    Args:
        channels: C of the input.
        num_heads: number of heads (default: the greatest common divisor of C and 8).
        block_size: rows and columns of a block (default: 8).
        halo_size: width of the halo, in rows and columns on each side of the block (default: 3).

    Raises:
        ValueError: block_size is < 1 or halo_size is negative.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, num_heads: int | None = None, block_size: int = 8, halo_size: int = 3) -> None:
        super().__init__()
        if block_size < 1 or halo_size < 0:
            raise ValueError(f"block_size must be ≥ 1 and halo_size ≥ 0, got {block_size} and {halo_size}")
        heads = _divisor(channels, num_heads, 8, "num_heads")
        self.block_size = block_size
        self.attention = HaloAttn(channels, num_heads=heads, block_size=block_size, halo_size=halo_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        height, width = x_BCHW.shape[2:]
        more = (0, -width % self.block_size, 0, -height % self.block_size)
        return self.attention(F.pad(x_BCHW, more))[:, :, :height, :width]


def _tokens(x_BCHW: Tensor, heads: int = 1) -> Tensor:
    """(B, C, H, W) → (B, heads, N, C / heads)."""
    return x_BCHW.flatten(2).unflatten(1, (heads, -1)).transpose(2, 3)


def _plane(tokens: Tensor, like_BCHW: Tensor) -> Tensor:
    """(B, heads, N, D) → (B, heads · D, H, W)."""
    return tokens.transpose(2, 3).flatten(1, 2).unflatten(2, like_BCHW.shape[2:])


def _continued(x: Tensor, axis: int, block: int) -> Tensor:
    """Repeat the last slice along an axis until its length is a multiple of the block.

    Replication padding does the same, but torch's inductor cannot compile its gradient.
    """
    missing = -x.shape[axis] % block
    if not missing:
        return x
    return torch.cat([x, x.narrow(axis, x.shape[axis] - 1, 1).repeat_interleave(missing, axis)], axis)


def _distances(table: Tensor, size: int) -> Tensor:
    """Look up values learned per distance, (2 S − 1, D), for every pair of positions → (size, size, D)."""
    if len(table) != 2 * size - 1:
        table = F.interpolate(table.T[None], 2 * size - 1, mode="linear", align_corners=True)[0].T
    place = torch.arange(size, device=table.device)
    return table[place[None] - place[:, None] + size - 1]
