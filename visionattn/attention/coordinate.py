"""Gates along rows and along columns: features pooled over one axis say where on the other.

Shapes: B batch, C channels, H rows, W columns.
"""

from timm.layers.coord_attn import CoordAttn
from torch import Tensor, nn

from visionattn.attention.channel import _bottleneck


class CoordinateAttention(nn.Module):
    """Coordinate attention (Hou et al. 2021, 2103.02907, eq. 4–9); timm's module under our interface.

        f   = hswish(BN(W1 [mean of x over W ; mean of x over H]))       the two side by side, H + W places
        g^h = sigmoid(Wh f^h),    g^w = sigmoid(Ww f^w)
        out[c, i, j] = x[c, i, j] · g^h[c, i] · g^w[c, j]

    Deviations from the paper: none of its equations; f is no wider than C needs, and hswish and batch normalisation are
    those of the authors' code. The convolutions have no bias.

    Args:
        channels: C of the input.
        reduction: C divided by the width of f; the width is at least 8, as the authors' is.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 32) -> None:
        super().__init__()
        self.attention = CoordAttn(channels, rd_channels=max(8, _bottleneck(channels, reduction)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(x_BCHW)
