"""A small residual network for experiments: it trains in a minute on a CPU.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from visionattn.models.architectures import remember_arguments


class ConvNet(nn.Module):
    """A residual network with a mechanism at the end of each residual branch.

        block:  x + attention(BN(conv(relu(BN(conv(x))))))        (He et al. 2016, 1512.03385; Woo et al. 2018, fig. 3)

    The stem has two convolutions. Every stage after the first one halves the resolution in its first block: with a stem
    of stride 4, two stages end at an eighth of the image's size.

    The last stage is pooled by its generalised mean (Radenović et al. 2018, 1711.02512, eq. 3; p is not learned):

        pooled = (mean over positions of x^p)^(1/p)

    Args:
        num_classes: K.
        widths: channels of each stage (default: 32, 64).
        depth: blocks per stage (default: 1).
        stem_stride: stride of both stem convolutions together, 1, 2 or 4 (default: 4); use less for small images.
        pool: p, ≥ 1 (default: 1, the mean). A larger p is closer to the maximum, for objects that fill a small part of
            the image.
        attention: function that makes a mechanism from a number of channels (default: no mechanism).
        head: function that makes a head from (channels of the last feature map, K), e.g. `attention.AttentionHead`; the
            head turns this map into logits (default: pooling and a linear layer).
        in_chans: C of the images (default: 3).

    Raises:
        ValueError: an argument is out of its range, or `pool` is combined with a head.

    Shape: (B, in_chans, H, W) → logits (B, K).
    """

    def __init__(
        self,
        num_classes: int,
        *,
        widths: Sequence[int] = (32, 64),
        depth: int = 1,
        stem_stride: Literal[1, 2, 4] = 4,
        pool: float = 1.0,
        attention: Callable[[int], nn.Module] | None = None,
        head: Callable[[int, int], nn.Module] | None = None,
        in_chans: int = 3,
    ) -> None:
        super().__init__()
        remember_arguments(self)
        if num_classes < 1 or depth < 1 or not widths:
            raise ValueError(
                f"a ConvNet needs at least one class, block and stage, got {num_classes=}, {depth=}, {widths=}"
            )
        if stem_stride not in (1, 2, 4):
            raise ValueError(f"stem_stride must be 1, 2 or 4, got {stem_stride}")
        if pool < 1:
            raise ValueError(f"pool must be ≥ 1, got {pool}")
        if head is not None and pool != 1:
            raise ValueError(
                f"pool does not apply to a custom head, which does the pooling; leave pool out, got {pool}"
            )
        self.num_classes = num_classes
        self.pool = pool
        self.stem = nn.Sequential(
            nn.Conv2d(in_chans, widths[0] // 2, 3, stride=2 if stem_stride > 1 else 1, padding=1, bias=False),
            nn.BatchNorm2d(widths[0] // 2),
            nn.ReLU(),
            nn.Conv2d(widths[0] // 2, widths[0], 3, stride=2 if stem_stride > 2 else 1, padding=1, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
        )
        blocks: list[nn.Module] = []
        for stage, width in enumerate(widths):
            for block in range(depth):
                before = widths[max(0, stage - 1)] if block == 0 else width
                stride = 2 if stage > 0 and block == 0 else 1
                blocks.append(ResidualBlock(before, width, stride=stride, attention=attention))
        self.blocks = nn.Sequential(*blocks)
        self.pools = head is None
        self.head = nn.Linear(widths[-1], num_classes) if head is None else head(widths[-1], num_classes)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)  # a third faster on CPUs
        x_BCHW = self.blocks(self.stem(x_BCHW))  # ≥ 0, since each block ends with a ReLU
        if not self.pools:
            return self.head(x_BCHW)
        # the mean exports to ONNX for any size, unlike adaptive pooling
        if self.pool == 1:
            return self.head(x_BCHW.mean((2, 3)))
        # the clamp keeps the gradient of the root finite
        return self.head(x_BCHW.clamp(min=1e-5).pow(self.pool).mean((2, 3)).pow(1 / self.pool))


class ResidualBlock(nn.Module):
    """Two 3 × 3 convolutions with a shortcut, and a mechanism at the end of the branch; see `ConvNet`."""

    def __init__(
        self, in_chans: int, out_chans: int, *, stride: int = 1, attention: Callable[[int], nn.Module] | None = None
    ) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(out_chans),
            nn.ReLU(),
            nn.Conv2d(out_chans, out_chans, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_chans),
        )
        self.attention = attention(out_chans) if attention else nn.Identity()
        same = in_chans == out_chans and stride == 1
        self.shortcut = (
            nn.Identity()
            if same
            else nn.Sequential(nn.Conv2d(in_chans, out_chans, 1, stride=stride, bias=False), nn.BatchNorm2d(out_chans))
        )
        self.act = nn.ReLU()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.act(self.shortcut(x_BCHW) + self.attention(self.branch(x_BCHW)))
