"""Convolutions with several branches, and a softmax over the branches for each channel.

Both modules replace a 3 × 3 convolution, so they have no shortcut. The gate is (B, P · C, 1, 1): first the C channels
of the first branch, then those of the second, and so on. Shapes: B batch, P branches, C channels, H rows, W columns.
"""

from collections import OrderedDict

import torch
from timm.layers import SelectiveKernel as SelectiveKernelBlock
from timm.layers import SplitAttn
from torch import Tensor, nn

from visionattn.attention.soft.channel import _BatchNorm2d, _bottleneck


class SelectiveKernel(nn.Module):
    """Selective kernels (Li et al. 2019, 1903.06586, eq. 1–6), built from timm's layers.

        u_p = relu(BN(conv_p(x)))                               3 × 3, of dilation 1 and 2
        a   = softmax over p of W2 relu(BN(W1 (mean over H·W of sum over p of u_p)))
        out = sum over p of a_p · u_p

    Deviations from the paper: none.

    Args:
        channels: C of the input.
        reduction: C divided by the width of the bottleneck; the width is at least 32, as in the paper (default: 16).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        width = max(32, _bottleneck(channels, reduction))
        block = SelectiveKernelBlock(channels, split_input=False, rd_channels=width)
        block.attn.bn = _BatchNorm2d(width)
        self.paths = block.paths
        self.gate = _BranchGate(block.attn)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        u_BPCHW = torch.stack([path(x_BCHW) for path in self.paths], 1)
        return (u_BPCHW * self.gate(u_BPCHW).view(*u_BPCHW.shape[:3], 1, 1)).sum(1)


class _BranchGate(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x).reshape(x.shape[0], -1, 1, 1)


class SplitAttention(nn.Module):
    """Split attention of ResNeSt (Zhang et al. 2020, 2004.08955, eq. 1–3, cardinality 1); timm's module.

        u_p = relu(BN(conv_3×3(x_p)))                           x_p the p-th part of the channels, u_p of C channels
        a   = softmax over p of W2 relu(BN(W1 (mean over H·W of sum over p of u_p)))
        out = sum over p of a_p · u_p

    Deviations from the paper: none.

    Args:
        channels: C of the input, a multiple of `radix`.
        radix: P, ≥ 2 (default: 2).
        reduction: C · P divided by the width of the bottleneck; the width is at least 32, as in the authors' code
            (default: 4).

    Raises:
        ValueError: radix is < 2, or channels is not a multiple of radix.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, radix: int = 2, reduction: int = 4) -> None:
        super().__init__()
        if radix < 2 or channels % radix:
            raise ValueError(
                f"SplitAttention needs radix ≥ 2 and channels that are a multiple of radix, "
                f"got radix={radix} and {channels} channels"
            )
        width = max(32, _bottleneck(channels * radix, reduction))
        self.attention = SplitAttn(channels, radix=radix, rd_channels=-(-width // radix), norm_layer=_BatchNorm2d)
        # timm's softmax, with its output reshaped to the four axes of a gate
        softmax = self.attention.rsoftmax
        self.attention.add_module("rsoftmax", nn.Sequential(OrderedDict(gate=_BranchGate(softmax))))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.attention(x_BCHW)
