"""Gates that weight the positions of a feature map.

Shapes: B batch, C channels, H rows, W columns; D channels of the gating signal.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.soft.channel import _BatchNorm2d
from visionattn.attention.soft.gate_ops import thin


class AttentionGate(nn.Module):
    """Attention gate of Attention U-Net (Oktay et al. 2018, 1804.03999, eq. 1–2), computed from a coarser map.

        gate = sigmoid(psi relu(W_x x + up(W_g g)))                             (B, 1, H, W)
        out  = x · gate

    W_x, W_g and psi are 1 × 1 convolutions, and up is bilinear interpolation. Unlike the other mechanisms, this one
    takes two inputs. Deviation from the paper: the gate is computed at the resolution of x. The paper downsamples W_x x
    to the resolution of g, and upsamples the gate to the resolution of x.

    Args:
        channels: C of x.
        signal_channels: D of the gating signal g.
        width: number of hidden channels (default: C / 2, at least 1).

    Raises:
        ValueError: width is < 1.

    Shape: (B, C, H, W), (B, D, any, any) → (B, C, H, W).
    """

    def __init__(self, channels: int, signal_channels: int, *, width: int | None = None) -> None:
        super().__init__()
        width = max(1, channels // 2) if width is None else width
        if width < 1:
            raise ValueError(f"width must be ≥ 1, got {width}")
        self.of_input = nn.Conv2d(channels, width, 1, bias=False)
        self.of_signal = nn.Conv2d(signal_channels, width, 1)
        self.score = nn.Conv2d(width, 1, 1)
        self.gate = nn.Sigmoid()

    def forward(self, x_BCHW: Tensor, signal_BDhw: Tensor) -> Tensor:
        near = self.of_input(x_BCHW)
        far = F.interpolate(self.of_signal(signal_BDhw), x_BCHW.shape[2:], mode="bilinear", align_corners=False)
        return x_BCHW * self.gate(self.score(F.relu(near + far)))


class GatherExcite(nn.Module):
    """Gather and excite (Hu et al. 2018, 1810.12348, sec. 2–3): gates computed from neighbourhoods.

        out = x · sigmoid(up(gather(x)))                              up: nearest-neighbour interpolation

    GE-θ⁻: gather averages neighbourhoods of (2e − 1) × (2e − 1) positions with stride e. GE-θ (learned): gather is
    log2(e) depthwise 3 × 3 convolutions of stride 2, each with batch normalisation, and ReLU between them. timm's `ge`
    is not used, since it cannot be built with learned weights. Deviation from the paper: the global extent with learned
    weights is left out, because it fits only one image size.

    Args:
        channels: C of the input.
        extent: e, a power of two ≥ 2; 0 gives the mean over all positions, without learned weights (default: 4).
        learned: GE-θ (default); False gives GE-θ⁻.

    Raises:
        ValueError: extent is neither 0 nor a power of two ≥ 2.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, extent: int = 4, learned: bool = True) -> None:
        super().__init__()
        if extent != 0 and (extent < 2 or extent & (extent - 1)):
            raise ValueError(f"extent must be 0 or a power of two ≥ 2, got {extent}")
        self.extent = extent
        layers: list[nn.Module] = []
        for _ in range(extent.bit_length() - 1 if learned else 0):
            layers += [
                nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False),
                _BatchNorm2d(channels),
                nn.ReLU(),
            ]
        self.gather = nn.Sequential(*layers[:-1])
        self.gate = nn.Sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if self.extent == 0:
            return x_BCHW * self.gate(x_BCHW.mean((2, 3), keepdim=True))
        if len(self.gather):
            gathered = self.gather(x_BCHW)
        else:
            window, extent = 2 * self.extent - 1, self.extent
            gathered = F.avg_pool2d(x_BCHW, window, extent, extent - 1, count_include_pad=False)
        return x_BCHW * F.interpolate(self.gate(gathered), x_BCHW.shape[2:])


class LSKA(nn.Module):
    """Large separable kernel attention (Lau et al. 2023, 2309.01439, eq. 6–9).

        near = conv_(2d−1)×1(conv_1×(2d−1)(x))
        far  = conv_⌊k/d⌋×1(conv_1×⌊k/d⌋(near)) with dilation d
        out  = x · conv_1×1(far)                                      all convolutions but this one are depthwise

    The gate has a value for each channel and position, and no sigmoid, as in the paper. Deviations from the paper:
    none.

    Args:
        channels: C of the input.
        kernel_size: k, the receptive field of the gate in pixels; ⌊k/d⌋ must be odd (default: 11).
        dilation: d (default: 2); the paper has (k, d) = (7, 2), (11, 2), (23, 3), (35, 3), (41, 3), (53, 3).

    Raises:
        ValueError: ⌊k/d⌋ is even.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, kernel_size: int = 11, dilation: int = 2) -> None:
        super().__init__()
        far = kernel_size // dilation if dilation > 0 else 0
        if far % 2 == 0:
            raise ValueError(
                f"kernel_size // dilation must be odd, so that the gate has the input's size, "
                f"got {kernel_size} // {dilation}"
            )

        def line(size: int, along_rows: bool, step: int) -> nn.Conv2d:
            shape, pad = (1, size), (0, step * (size // 2))
            if not along_rows:
                shape, pad = shape[::-1], pad[::-1]
            return nn.Conv2d(channels, channels, shape, padding=pad, dilation=step, groups=channels)

        near = 2 * dilation - 1
        self.gate = nn.Sequential(
            *(line(near, True, 1), line(near, False, 1), line(far, True, dilation), line(far, False, dilation)),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return x_BCHW * thin(self.gate, x_BCHW)
