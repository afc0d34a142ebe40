"""Gates along rows and along columns, computed from features pooled over the other axis.

Shapes: B batch, C channels, H rows, W columns.
"""

import torch
from timm.layers.coord_attn import CoordAttn, EfficientLocalAttn, SimpleCoordAttn, StripAttn
from torch import Tensor, nn

from visionattn.attention.soft.channel import _bottleneck, _must_be_odd
from visionattn.attention.soft.gate_ops import mean, outer, pointwise, thin


class CoordinateAttention(nn.Module):
    """Coordinate attention (Hou et al. 2021, 2103.02907, eq. 4–9), with timm's weights.

        f   = hswish(BN(W1 [mean of x over W ; mean of x over H]))       the means concatenated, H + W positions
        g^h = sigmoid(Wh f^h),    g^w = sigmoid(Ww f^w)
        out[c, i, j] = x[c, i, j] · g^h[c, i] · g^w[c, j]

    Deviations from the paper: none in its equations; hswish and batch normalisation are those of the authors' code. The
    convolutions have no bias.

    Args:
        channels: C of the input.
        reduction: C divided by the width of f; the width is at least 8, as in the authors' code (default: 32).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 32) -> None:
        super().__init__()
        self.attention = CoordAttn(channels, rd_channels=max(8, _bottleneck(channels, reduction)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block = self.attention
        squeezed = torch.cat([mean(x_BCHW, 3), mean(x_BCHW, 2).mT], 2)
        both = block.act(block.bn1(pointwise(block.conv1, squeezed)))
        of_rows, of_columns = both.split(x_BCHW.shape[2:], 2)
        rows_BCH1 = block.gate(pointwise(block.conv_h, of_rows))
        columns_BC1W = block.gate(pointwise(block.conv_w, of_columns.mT))
        return x_BCHW * outer(rows_BCH1, columns_BC1W)


class SimpleCoordinateAttention(nn.Module):
    """Coordinate attention with one gate, the sigmoid of a sum over both axes, with timm's weights.

        out[c, i, j] = x[c, i, j] · sigmoid(Wh f(mean of x over W)[i] + Ww f(mean of x over H)[j])[c]
        f(z)         = silu(W1 z)

    This variant has no paper; `CoordinateAttention` has one.

    Args:
        channels: C of the input.
        reduction: C divided by the width of f; the width is at least 8 (default: 8).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        self.attention = SimpleCoordAttn(channels, rd_channels=max(8, _bottleneck(channels, reduction)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block = self.attention
        of_rows = block.fc_h(block.act(block.fc1(mean(x_BCHW, 3).squeeze(3).mT))).mT
        of_columns = block.fc_w(block.act(block.fc1(mean(x_BCHW, 2).squeeze(2).mT))).mT
        return x_BCHW * block.gate(of_rows[:, :, :, None] + of_columns[:, :, None])


class ELA(nn.Module):
    """Efficient local attention (Xu & Wan 2024, 2403.01123, eq. 3–6), with timm's weights.

        g^h = sigmoid(silu(GN(conv1d_k(mean of x over W)))),    g^w the same of the mean over H
        out[c, i, j] = x[c, i, j] · g^h[c, i] · g^w[c, j]       the convolutions are depthwise

    Deviations from the paper, as in timm: silu before the sigmoid; the normalisation has one group instead of 16; each
    axis has its own convolution.

    Args:
        channels: C of the input.
        kernel_size: k, odd (default: 7).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7) -> None:
        super().__init__()
        _must_be_odd(kernel_size)
        self.attention = EfficientLocalAttn(channels, kernel_size=kernel_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block = self.attention
        of_rows = thin(block.conv_h, mean(x_BCHW, 3))
        of_columns = thin(block.conv_w, mean(x_BCHW, 2))
        rows_BCH1 = block.gate(block.act(block.norm_h(of_rows)))
        columns_BC1W = block.gate(block.act(block.norm_w(of_columns)))
        return x_BCHW * outer(rows_BCH1, columns_BC1W)


class StripAttention(nn.Module):
    """One gate from means along rows and means along columns, each convolved, then added; with timm's weights.

        out = x · sigmoid(conv_k×1(mean of x over W) + conv_1×k(mean of x over H))      depthwise convolutions

    Strip pooling (Hou et al. 2020, 2003.13328) is similar, but its convolutions are dense, and another convolution
    mixes the sum.

    Args:
        channels: C of the input.
        kernel_size: k, odd (default: 3).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, kernel_size: int = 3) -> None:
        super().__init__()
        _must_be_odd(kernel_size)
        self.attention = StripAttn(channels, kernel_size=kernel_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block = self.attention
        of_rows = thin(block.conv_h, mean(x_BCHW, 3))
        of_columns = thin(block.conv_w, mean(x_BCHW, 2))
        return x_BCHW * block.gate(of_rows + of_columns)
