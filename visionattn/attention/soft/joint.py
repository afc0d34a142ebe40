"""Gates over channels and positions, in sequence or combined.

Shapes: B batch, C channels, H rows, W columns; G groups of D channels.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.cbam import CbamModule, LightCbamModule
from torch import Tensor, nn

from visionattn.attention.soft.channel import _BatchNorm2d, _bottleneck, _divisor, _must_be_odd
from visionattn.attention.soft.gate_ops import mean, narrowed, outer, pointwise, pooled, pooled_positions, thin


class CBAM(nn.Module):
    """Convolutional block attention (Woo et al. 2018, 1807.06521, eq. 1–3), with timm's weights.

        x'  = x · sigmoid(MLP(mean of x over H·W) + MLP(max of x over H·W))
        out = x' · sigmoid(conv_k([mean of x' over C; max of x' over C]))

    Deviation from the paper: the k × k convolution is followed by batch normalisation, as in the authors' code.

    Args:
        channels: C of the input.
        reduction: C divided by the width of the MLP's bottleneck; the width is at least 1 (default: 16).
        kernel_size: k of the spatial gate's convolution, odd (default: 7).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        _must_be_odd(kernel_size)
        self.attention = CbamModule(
            channels, rd_channels=_bottleneck(channels, reduction), spatial_kernel_size=kernel_size
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # timm's layers in timm's order; one call of the MLP processes means and maxima
        channel, spatial = self.attention.channel, self.attention.spatial
        x_BCHW, *both_BC11 = pooled_positions(x_BCHW)
        squeezed = torch.cat(both_BC11)
        both = pointwise(channel.fc2, channel.act(pointwise(channel.fc1, squeezed)))
        of_mean, of_maximum = both.unflatten(0, (2, x_BCHW.shape[0])).unbind()  # chunk would fix B in an exported graph
        x_BCHW, *planes_B1HW = pooled(x_BCHW * channel.gate(of_mean + of_maximum), 1)
        return x_BCHW * spatial.gate(thin(spatial.conv, torch.cat(planes_B1HW, 1)))


class LightCBAM(nn.Module):
    """CBAM that adds means and maxima before the MLP and the convolution, with timm's weights.

        x'  = x · sigmoid(MLP(z)),                  z = (mean of x over H·W) / 2 + (max of x over H·W) / 2
        out = x' · sigmoid(BN(conv_k(z')))          z' = (mean of x' over C) / 2 + (max of x' over C) / 2

    This variant has no paper; `CBAM` has one.

    Args:
        channels: C of the input.
        reduction: C divided by the width of the MLP's bottleneck; the width is at least 1 (default: 16).
        kernel_size: k of the spatial gate's convolution, odd (default: 7).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 16, kernel_size: int = 7) -> None:
        super().__init__()
        _must_be_odd(kernel_size)
        self.attention = LightCbamModule(
            channels, rd_channels=_bottleneck(channels, reduction), spatial_kernel_size=kernel_size
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # timm's layers in timm's order; timm's own channel part does not call its `gate`, so no hook could record it
        channel, spatial = self.attention.channel, self.attention.spatial
        x_BCHW, mean_BC11, maximum_BC11 = pooled_positions(x_BCHW)
        z_BC11 = 0.5 * (mean_BC11 + maximum_BC11)
        x_BCHW = x_BCHW * channel.gate(pointwise(channel.fc2, channel.act(pointwise(channel.fc1, z_BC11))))
        x_BCHW, mean_B1HW, maximum_B1HW = pooled(x_BCHW, 1)
        return x_BCHW * spatial.gate(thin(spatial.conv, 0.5 * (mean_B1HW + maximum_B1HW)))


class BAM(nn.Module):
    """Bottleneck attention module (Park et al. 2018, 1807.06514, eq. 1–4).

        M   = sigmoid(M_c + M_s)
        M_c = W1 relu(BN(W0 (mean of x over H·W)))                              (B, C, 1, 1)
        M_s = conv_1(relu(BN(conv_3(relu(BN(conv_3(relu(BN(conv_1(x))))))))))   (B, 1, H, W)
        out = x + x · M

    Deviation from the paper: its equations normalise the end of each branch; here, as in the authors' code, every
    hidden layer is normalised instead.

    Args:
        channels: C of the input.
        reduction: C divided by the width of both branches; the width is at least 1 (default: 16).
        dilation: of the two 3 × 3 convolutions (default: 4).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 16, dilation: int = 4) -> None:
        super().__init__()
        width = _bottleneck(channels, reduction)
        self.channel = nn.Sequential(
            nn.Conv2d(channels, width, 1), _BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, channels, 1)
        )
        self.spatial = nn.Sequential(
            *(nn.Conv2d(channels, width, 1), _BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), _BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation), _BatchNorm2d(width), nn.ReLU()),
            nn.Conv2d(width, 1, 1),
        )
        self.gate = nn.Sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        squeeze, norm, relu, restore = _layers(self.channel)
        of_channel_BC11 = pointwise(restore, relu(norm(pointwise(squeeze, mean(x_BCHW, 2, 3)))))
        narrow, *layers, score = _layers(self.spatial)
        planes = narrowed(narrow, x_BCHW)
        for layer in layers:
            planes = thin(layer, planes) if isinstance(layer, nn.Conv2d) else layer(planes)
        gate_BCHW = self.gate(of_channel_BC11 + narrowed(score, planes))
        return x_BCHW * (1 + gate_BCHW)


class SimAM(nn.Module):
    """Weight every activation by how much it differs from its channel's mean (Yang et al. 2021, PMLR 139, eq. 5–6).

        1/e = (x - mean)^2 / (4 (var + lambda)) + 1/2        mean, var over the H·W positions of a channel
        out = x · sigmoid(1/e)

    The module has no learned weights. Deviations from the paper: var divides by H·W − 1, as in the authors' code; if
    H·W = 1, both x − mean and var are 0.

    Args:
        channels: C of the input. Unused; every mechanism is built from its number of channels.
        regularisation: lambda, > 0. Larger values give flatter gates (default: 1e-4).

    Raises:
        ValueError: regularisation is not > 0.

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, regularisation: float = 1e-4) -> None:
        super().__init__()
        if regularisation <= 0:
            raise ValueError(f"regularisation must be > 0, got {regularisation}")
        self.regularisation = regularisation
        self.gate = nn.Sigmoid()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # group_norm's variance divides by N, not by N − 1: scale and eps are corrected by (N − 1) / N
        count = x_BCHW.shape[2] * x_BCHW.shape[3]
        correction = max(1, count - 1) / count
        scale_C = x_BCHW.new_full(x_BCHW.shape[1:2], (correction / 4) ** 0.5)
        root_BCHW = torch.group_norm(x_BCHW, x_BCHW.shape[1], scale_C, eps=self.regularisation * correction)
        return x_BCHW * self.gate(root_BCHW.square() + 0.5)


class TripletAttention(nn.Module):
    """Triplet attention (Misra et al. 2020, 2010.03045, eq. 1 and 4).

        Z_d(x) = [max of x over axis d; mean of x over axis d]
        g_d    = sigmoid(BN(conv_k(Z_d(x))))            over the plane of the two other axes, for d in C, H and W
        out    = x · (g_C + g_H + g_W) / 3

    Deviations from the paper: none; the paper multiplies x by each gate and averages the results, which is the same.

    Args:
        channels: C of the input. Unused; every mechanism is built from its number of channels.
        kernel_size: k of the three convolutions, odd (default: 7).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, kernel_size: int = 7) -> None:
        super().__init__()
        self.gate = _TripletGate(kernel_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # each call returns x, so that one chain carries the gradients of all poolings; see `pooled`
        planes = []
        for dim in (1, 2, 3):
            x_BCHW, mean_, maximum = pooled(x_BCHW, dim)
            planes.append(torch.stack([maximum.squeeze(dim), mean_.squeeze(dim)], 1))
        return x_BCHW * self.gate(*planes)


class _TripletGate(nn.Module):
    def __init__(self, kernel_size: int) -> None:
        super().__init__()
        self.over_channels = _plane_gate(kernel_size)
        self.over_rows = _plane_gate(kernel_size)
        self.over_columns = _plane_gate(kernel_size)

    def forward(self, planes_B2HW: Tensor, planes_B2CW: Tensor, planes_B2CH: Tensor) -> Tensor:
        parts = (
            (self.over_channels, planes_B2HW),
            (self.over_rows, planes_B2CW),
            (self.over_columns, planes_B2CH),
        )
        gate_B1HW, gate_BC1W, gate_BCH1 = (
            thin(gate, planes).sigmoid().squeeze(1).unsqueeze(dim) for dim, (gate, planes) in enumerate(parts, 1)
        )
        return (gate_B1HW / 3 + gate_BC1W / 3) + gate_BCH1 / 3


class EMA(nn.Module):
    """Efficient multi-scale attention (Ouyang et al. 2023, 2305.13563, fig. 3 and eq. 1–2).

    u is one of G groups of D = C / G channels. Two maps, far and near, are computed from u, and each weights the other:

        far   = GN(u · sigmoid(h) · sigmoid(w)),    [h ; w] = conv_1([mean of u over W ; mean of u over H])
        near  = conv_3(u)
        gate  = sigmoid(softmax(mean of far over H·W)ᵀ near + softmax(mean of near over H·W)ᵀ far)
        out   = u · gate                            softmax and products over the D channels

    The groups share their weights. The mean of far over H·W is the bias of GN. Only sums of near are needed, and these
    are computed without near itself. Deviations from the paper: none. Details that the paper leaves open are those of
    the authors' code.

    Args:
        channels: C of the input.
        groups: G (default: the greatest common divisor of C and 8).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, groups: int | None = None) -> None:
        super().__init__()
        self.groups = _divisor(channels, groups, 8, "groups")
        self.gate = _MultiScaleGate(channels // self.groups, self.groups)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        gate_BGHW = self.gate(x_BCHW)
        return (x_BCHW.unflatten(1, (self.groups, -1)) * gate_BGHW[:, :, None]).flatten(1, 2)


class _MultiScaleGate(nn.Module):
    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.along = nn.Conv2d(width, width, 1)
        self.norm = nn.GroupNorm(width, width)
        self.near = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        batch, _, height, width = x_BCHW.shape
        u = x_BCHW.reshape(batch * self.groups, -1, height, width)  # (B · G, D, H, W), like all tensors below
        both = pointwise(self.along, torch.cat([mean(u, 3), mean(u, 2).mT], 2)).sigmoid()
        rows, columns = both.split([height, width], 2)
        far = self.norm(u * outer(rows, columns.mT))
        # weights of near's channels; they are applied to the kernels, so that one convolution gives the weighted sum
        of_far_D = F.softmax(self.norm.bias, 0)
        kernel_D33 = torch.einsum("e,edij->dij", of_far_D, self.near.weight)
        assert self.near.bias is not None
        of_near = partial(F.conv2d, weight=kernel_D33[None], bias=(of_far_D @ self.near.bias)[None], padding=1)
        near = thin(of_near, u)
        far = (self._mean_near(u).softmax(1)[:, None] @ far.flatten(2)).view_as(near)
        return (near + far).sigmoid().view(batch, self.groups, height, width)

    def _mean_near(self, u: Tensor) -> Tensor:
        """Return the mean of conv_3(u) over positions, (B · G, D), from the sum of the inputs at each kernel weight."""
        meets_9N = F.unfold(torch.ones_like(u[:1, :1]), 3, padding=1)[0].flip(0)
        sums = (u.flatten(2) @ meets_9N.mT).flatten(1)
        return F.linear(sums / meets_9N.shape[1], self.near.weight.flatten(1), self.near.bias)


def _layers(sequential: nn.Sequential) -> list[Any]:  # Any: callers know the classes
    return list(sequential)


def _plane_gate(kernel_size: int) -> nn.Sequential:
    _must_be_odd(kernel_size)
    return nn.Sequential(nn.Conv2d(2, 1, kernel_size, padding=kernel_size // 2, bias=False), nn.BatchNorm2d(1))
