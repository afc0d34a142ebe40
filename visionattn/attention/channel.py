"""Gates over channels, (B, C, 1, 1): which features matter.

Shapes: B batch, C channels, H rows, W columns.
"""

import math

import torch
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


class FcaNet(nn.Module):
    """Frequency channel attention (Qin et al. 2021, 2012.11929, eq. 10–12): each channel is pooled by a cosine.

        z[c] = mean over i, j of x[c, i, j] · f_u(i, H) · f_v(j, W),            (u, v) the frequency of c's group
        f_u(i, H) = cos(pi U (i + 1/2) / H) · (1 if U = 0 else √2),             U = ⌊u H / 7⌋
        out = x · sigmoid(W2 relu(W1 z))

    The paper splits the channels into 16 groups and gives them the 16 best of the 7 × 7 parts of the spectrum; (0, 0)
    is the mean, so that one group makes this squeeze and excitation. Deviations from the paper: the cosines are made
    for the input's own size, where the authors' code pools the input to a fixed size first, and are scaled so that
    (0, 0) is the mean at any size; groups need not be equal, and C < 16 uses the C best frequencies.

    Args:
        channels: C of the input.
        reduction: C divided by the width of the bottleneck; the width is at least 1.
        frequencies: number of groups, 1 to 16.

    Shape: (B, C, H, W) → the same.
    """

    frequency_C2: Tensor  # noqa: N815

    def __init__(self, channels: int, *, reduction: int = 16, frequencies: int = 16) -> None:
        super().__init__()
        if not 1 <= frequencies <= len(_FREQUENCIES):
            raise ValueError(f"frequencies must be between 1 and {len(_FREQUENCIES)}, got {frequencies}")
        groups = min(frequencies, channels)
        chosen_C2 = torch.tensor([_FREQUENCIES[channel * groups // channels] for channel in range(channels)])
        self.register_buffer("frequency_C2", chosen_C2, persistent=False)
        width = _bottleneck(channels, reduction)
        self.mlp = nn.Sequential(
            nn.Linear(channels, width, bias=False), nn.ReLU(), nn.Linear(width, channels, bias=False)
        )
        self.gate = nn.Sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        rows_CH = _cosines(self.frequency_C2[:, 0], x_BCHW.shape[2], x_BCHW.dtype)
        columns_CW = _cosines(self.frequency_C2[:, 1], x_BCHW.shape[3], x_BCHW.dtype)
        z_BC = (x_BCHW * (rows_CH[:, :, None] * columns_CW[:, None]).to(x_BCHW.dtype)).mean((2, 3))
        return x_BCHW * self.gate(self.mlp(z_BC)[:, :, None, None])


_FREQUENCIES = (
    *((0, 0), (0, 1), (6, 0), (0, 5), (0, 2), (1, 0), (1, 2), (4, 0)),
    *((5, 0), (1, 6), (3, 0), (0, 4), (0, 6), (0, 3), (3, 5), (2, 2)),
)
"""(u, v) of a 7 × 7 spectrum, rows and columns, the best alone first, as the authors' code lists them."""


def _cosines(frequency_C: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    own_C1 = (frequency_C * size // 7)[:, None]
    exact = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot count the places of a row
    angle_CN = own_C1 * (torch.arange(size, device=frequency_C.device, dtype=exact) + 0.5) * (math.pi / size)
    return angle_CN.cos() * ((own_C1 > 0) * (math.sqrt(2) - 1) + 1)


def _bottleneck(channels: int, reduction: int) -> int:
    if reduction < 1:
        raise ValueError(f"reduction must be ≥ 1, got {reduction}")
    return max(1, channels // reduction)
