"""Gates over channels and positions, one after the other or at once.

Shapes: B batch, C channels, H rows, W columns.
"""

from timm.layers.cbam import CbamModule
from torch import Tensor, nn

from visionattn.attention.channel import _bottleneck


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al. 2018, 1807.06521, eq. 1–3); timm's module under our interface.

        x'  = x · sigmoid(MLP(mean of x over H·W) + MLP(max of x over H·W))
        out = x' · sigmoid(conv_k([mean of x' over C; max of x' over C]))

    Deviation from the paper: the k × k convolution is followed by batch normalisation, as in the authors' code.

    Args:
        channels: C of the input.
        reduction: C divided by the width of the MLP's bottleneck; the width is at least 1.
        kernel_size: k of the spatial gate's convolution; odd.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd so that the gate stays in place, got {kernel_size}")
        self.attention = CbamModule(
            channels, rd_channels=_bottleneck(channels, reduction), spatial_kernel_size=kernel_size
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(x_BCHW)
