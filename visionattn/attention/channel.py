"""Gates over channels, (B, C, 1, 1): which features matter.

Shapes: B batch, C channels, H rows, W columns.
"""

from timm.layers import EcaModule, SEModule
from torch import Tensor, nn


class SE(nn.Module):
    """Squeeze and excitation (Hu et al. 2018, 1709.01507, eq. 2–4); timm's module under our interface.

        z = mean of x over H·W
        out = x · sigmoid(W2 relu(W1 z + b1) + b2)

    Args:
        channels: C of the input.
        reduction: C divided by the width of the bottleneck; the width is at least 1.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.attention = SEModule(channels, rd_channels=_bottleneck(channels, reduction))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(x_BCHW)


class ECA(nn.Module):
    """Efficient channel attention (Wang et al. 2020, 1910.03151, eq. 5 and 12); timm's module under our interface.

        out = x · sigmoid(conv1d_k(mean of x over H·W)),    k = |log2(C) / 2 + 1 / 2| made odd

    Deviation from the paper: k is at least 3, so that few channels attend to their neighbours too.

    Args:
        channels: C of the input.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = EcaModule(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(x_BCHW)


def _bottleneck(channels: int, reduction: int) -> int:
    if reduction < 1:
        raise ValueError(f"reduction must be ≥ 1, got {reduction}")
    return max(1, channels // reduction)
