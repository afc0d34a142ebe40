"""Gates over channels and positions, one after the other or at once.

Shapes: B batch, C channels, H rows, W columns.
"""

import torch
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
        _must_be_odd(kernel_size)
        self.attention = CbamModule(
            channels, rd_channels=_bottleneck(channels, reduction), spatial_kernel_size=kernel_size
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(x_BCHW)


class SimAM(nn.Module):
    """Weigh every activation by how much it stands out from its channel (Yang et al. 2021, PMLR 139, eq. 5–6).

        1/e = (x - mean)^2 / (4 (var + lambda)) + 1/2        mean, var over the H·W positions of a channel
        out = x · sigmoid(1/e)

    It has no weights to learn. Deviations from the paper: var divides by H·W − 1, as the authors' code does, and a
    single position stands out by nothing.

    Args:
        channels: C of the input; unused, and taken so that every mechanism is built alike.
        regularisation: lambda, > 0; larger is flatter.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, regularisation: float = 1e-4) -> None:
        super().__init__()
        if regularisation <= 0:
            raise ValueError(f"regularisation must be > 0, got {regularisation}")
        self.regularisation = regularisation
        self.gate = nn.Sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        square_BCHW = (x_BCHW - x_BCHW.mean((2, 3), keepdim=True)).square()
        var_BC11 = square_BCHW.sum((2, 3), keepdim=True) / max(1, x_BCHW.shape[2] * x_BCHW.shape[3] - 1)
        return x_BCHW * self.gate(square_BCHW / (4 * (var_BC11 + self.regularisation)) + 0.5)


class TripletAttention(nn.Module):
    """Triplet attention (Misra et al. 2020, 2010.03045, eq. 1 and 4).

        Z_d(x) = [max of x over axis d; mean of x over axis d]
        g_d    = sigmoid(BN(conv_k(Z_d(x))))            over the plane of the two other axes, for d in C, H and W
        out    = x · (g_C + g_H + g_W) / 3

    Deviation from the paper: none; it multiplies x by each gate and takes the mean, which is the same.

    Args:
        channels: C of the input; unused, and taken so that every mechanism is built alike.
        kernel_size: k of the three convolutions; odd.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7) -> None:
        super().__init__()
        self.gate = _TripletGate(kernel_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.gate(x_BCHW)


class _TripletGate(nn.Module):
    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.over_channels = _plane_gate(kernel_size)
        self.over_rows = _plane_gate(kernel_size)
        self.over_columns = _plane_gate(kernel_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        gate_B1HW = self.over_channels(_extremes(x_BCHW, 1)).sigmoid()
        gate_BC1W = self.over_rows(_extremes(x_BCHW, 2)).sigmoid().transpose(1, 2)
        gate_BCH1 = self.over_columns(_extremes(x_BCHW, 3)).sigmoid().squeeze(1).unsqueeze(3)
        return (gate_B1HW / 3 + gate_BC1W / 3) + gate_BCH1 / 3


def _extremes(x_BCHW: Tensor, axis: int) -> Tensor:
    """Maximum and mean over an axis, as two channels of the plane of the others."""
    return torch.stack([x_BCHW.amax(axis), x_BCHW.mean(axis)], 1)


def _plane_gate(kernel_size: int) -> nn.Sequential:
    _must_be_odd(kernel_size)
    return nn.Sequential(nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False), nn.BatchNorm2d(1))


def _must_be_odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd so that the gate stays in place, got {kernel_size}")
