"""Gates over channels, (B, C, 1, 1), which weight the features.

Shapes: B batch, C channels, H rows, W columns.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import CecaModule, EcaModule, EffectiveSEModule, SEModule
from torch import Tensor, nn

from visionattn.attention.soft.gate_ops import mean, pointwise


class SE(nn.Module):
    """Squeeze and excitation (Hu et al. 2018, 1709.01507, eq. 2–4). Its parameters are those of timm's `SEModule`.

        z = mean of x over H·W
        out = x · sigmoid(W2 relu(W1 z + b1) + b2)

    Args:
        channels: C of the input.
        reduction: C divided by the width of the bottleneck; the width is at least 1 (default: 16).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        self.attention = SEModule(channels, rd_channels=_bottleneck(channels, reduction))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block: Any = self.attention  # timm's layers are not typed
        return x_BCHW * block.gate(block.fc2(block.act(block.fc1(mean(x_BCHW, 2, 3)))))  # equals timm's bit by bit


class EffectiveSE(nn.Module):
    """Effective squeeze and excitation (Lee & Park 2020, 1911.06667, eq. 4–5), with timm's
    parameters.

        out = x · hard_sigmoid(W (mean of x over H·W) + b),     hard_sigmoid(z) = clamp(z / 6 + 1 / 2, 0, 1)

    Deviation from the paper: its equation has a sigmoid; the authors' code and this module have the hard sigmoid.

    Args:
        channels: C of the input.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = EffectiveSEModule(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block: Any = self.attention  # timm's layers are not typed
        return x_BCHW * block.gate(pointwise(block.fc, mean(x_BCHW, 2, 3)))


class ECA(nn.Module):
    """Efficient channel attention (Wang et al. 2020, 1910.03151, eq. 5 and 12), by timm's module.

        out = x · sigmoid(conv1d_k(mean of x over H·W)),    k = |log2(C) / 2 + 1 / 2| made odd

    Deviation from the paper: k is at least 3, so that neighbouring channels are mixed even if C is small.

    Args:
        channels: C of the input.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = EcaModule(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(x_BCHW)


class CircularECA(nn.Module):
    """Efficient channel attention whose convolution wraps around from the last channel to the first, by timm's module.

    The padding of `ECA` is circular here instead of zeros, so that no channel is at an edge. This variant has no paper.

    Args:
        channels: C of the input.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.attention = CecaModule(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(x_BCHW)


class WideECA(nn.Module):
    """Efficient channel attention with a hidden layer, by timm's module (`ecam`).

        out = x · sigmoid(conv1d_k(relu(w · mean of x over H·W + b)))

    w and b turn each channel's mean into several values, and the convolution mixes the values of k neighbouring
    channels. This variant has no paper.

    Args:
        channels: C of the input.
        width: values per channel (default: 8).

    Raises:
        ValueError: width is < 1.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, width: int = 8) -> None:
        super().__init__()
        if width < 1:
            raise ValueError(f"width must be ≥ 1, got {width}")
        self.attention = EcaModule(channels, use_mlp=True, rd_channels=width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(x_BCHW)


class GCT(nn.Module):
    """Gated channel transformation (Yang et al. 2020, 1909.11519, eq. 2–4): channels compete or cooperate.

        s[c]  = alpha[c] · sqrt(sum over H·W of x[c]^2 + eps)
        gate  = 1 + tanh(gamma · s / sqrt(mean over C of s^2 + eps) + beta)
        out   = x · gate

    gamma and beta start at 0, where the module is the identity. Deviations from the paper: none; the paper's √C ŝ / ‖s‖
    is written as a mean over C.

    Args:
        channels: C of the input.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gate = _Competition(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * self.gate(x_BCHW)


class _Competition(nn.Module):
    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(channels, 1, 1))
        self.gamma = nn.Parameter(torch.zeros(channels, 1, 1))
        self.beta = nn.Parameter(torch.zeros(channels, 1, 1))
        self.eps = eps

    def forward(self, x_BCHW: Tensor) -> Tensor:
        s_BC11 = self.alpha * (x_BCHW.square().sum((2, 3), keepdim=True) + self.eps).sqrt()
        rms_B111 = (s_BC11.square().mean(1, keepdim=True) + self.eps).sqrt()
        return 1 + torch.tanh(self.gamma * (s_BC11 / rms_B111) + self.beta)


class FcaNet(nn.Module):
    """Frequency channel attention (Qin et al. 2021, 2012.11929, eq. 10–12): each channel is pooled with a cosine.

        z[c] = mean over i, j of x[c, i, j] · f_u(i, H) · f_v(j, W),            (u, v) the frequency of c's group
        f_u(i, H) = cos(pi U (i + 1/2) / H) · (1 if U = 0 else √2),             U = ⌊u H / 7⌋
        out = x · sigmoid(W2 relu(W1 z))

    The paper splits the channels into 16 groups, one for each of the 16 best frequencies of a 7 × 7 spectrum. The
    frequency (0, 0) gives the mean, so that a single group gives squeeze and excitation. Deviations from the paper: the
    cosines have the input's size, whereas the authors' code pools the input to a fixed size; the cosines are scaled so
    that (0, 0) is the mean at any size; groups may be unequal, and if C < 16, the C best frequencies are used.

    Args:
        channels: C of the input.
        reduction: C divided by the width of the bottleneck; the width is at least 1 (default: 16).
        frequencies: number of groups, 1 to 16 (default: 16).

    Raises:
        ValueError: frequencies is out of its range.

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
"""Frequencies (u, v) along rows and columns in a 7 × 7 spectrum, the best first, as in the authors' code."""


def _cosines(frequency_C: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    own_C1 = (frequency_C * size // 7)[:, None]
    exact = torch.promote_types(dtype, torch.float32)  # bfloat16 cannot represent the indices of a long row
    angle_CN = own_C1 * (torch.arange(size, device=frequency_C.device, dtype=exact) + 0.5) * (math.pi / size)
    return angle_CN.cos() * ((own_C1 > 0) * (math.sqrt(2) - 1) + 1)


def _bottleneck(channels: int, reduction: int) -> int:
    if reduction < 1:
        raise ValueError(f"reduction must be ≥ 1, got {reduction}")
    return max(1, channels // reduction)


class _BatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation that uses the running statistics if each channel has a single value, and so no variance."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.training and x_BCHW.shape[0] * x_BCHW.shape[2] * x_BCHW.shape[3] == 1:
            return F.batch_norm(x_BCHW, self.running_mean, self.running_var, self.weight, self.bias, False, 0, self.eps)
        return super().forward(x_BCHW)


def _divisor(channels: int, number: int | None, most: int, what: str) -> int:
    """Return the number of heads or groups: `number`, or by default the greatest common divisor of `most` and C.

    Raises:
        ValueError: C is not a multiple of the number.
    """
    if number is None:
        return math.gcd(channels, most)
    if number < 1 or channels % number:
        raise ValueError(f"{channels} channels are not a multiple of {what}={number}; pass a divisor")
    return number


def _must_be_odd(kernel_size: int) -> None:
    if kernel_size < 1 or kernel_size % 2 == 0:
        raise ValueError(f"kernel_size must be odd, so that the gate has the input's size, got {kernel_size}")
