"""Operations of gates, written so that the backward pass reads and writes the features few times.

The cost of a gate is reading and writing tensors of the features' size, mostly in the backward pass.

Shapes: B batch, C channels, H rows, W columns, D output channels.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mean(x: Tensor, *dims: int) -> Tensor:
    """Return the mean over dims, kept with size 1; torch's own mean materialises its gradient at the size of x."""
    wide = torch.float32 if x.dtype.itemsize < 4 else x.dtype  # a sum may overflow in half precision
    return (x.sum(dims, keepdim=True, dtype=wide) / math.prod([x.shape[dim] for dim in dims])).to(x.dtype)


def pooled(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, and its mean and maximum over a dim, kept with size 1.

    Use the returned x in place of the argument. One pass over x then computes the gradients of all three; torch's own
    operations would materialise and add three gradients of x's size.
    """
    if torch.is_grad_enabled() and x.requires_grad:
        return _Pooled.apply(x, dim)[:3]
    return x, mean(x, dim), x.max(dim, keepdim=True).values


def pooled_positions(x_BCHW: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return x with its mean and maximum over positions, (B, C, 1, 1), in the memory format of x; see `pooled`."""
    if x_BCHW.is_contiguous(memory_format=torch.channels_last):
        x_BHWC = x_BCHW.permute(0, 2, 3, 1)
        x_BNC, mean_B1C, maximum_B1C = pooled(x_BHWC.flatten(1, 2), 1)
        mean_BC11, maximum_BC11 = (part.mT[..., None] for part in (mean_B1C, maximum_B1C))
        return x_BNC.view(x_BHWC.shape).permute(0, 3, 1, 2), mean_BC11, maximum_BC11
    x_BCN, mean_BC1, maximum_BC1 = pooled(x_BCHW.flatten(2), 2)
    return x_BCN.view(x_BCHW.shape), mean_BC1[..., None], maximum_BC1[..., None]


class _Pooled(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        maximum_, index = x.max(dim, keepdim=True)
        return x.view_as(x), mean(x, dim), maximum_, index

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, int], output: tuple[Tensor, ...]
    ) -> None:  # torch's context is untyped
        ctx.dim = inputs[1]
        ctx.mark_non_differentiable(output[3])
        ctx.save_for_backward(output[3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        of_x, of_mean, of_maximum, _ = gradients
        (index,) = ctx.saved_tensors
        gradient = torch.add(of_x, of_mean, alpha=1 / of_x.shape[ctx.dim])
        return gradient.scatter_add_(ctx.dim, index, of_maximum), None


def outer(rows_BCH1: Tensor, columns_BC1W: Tensor) -> Tensor:
    """Return rows · columns, (B, C, H, W), as a matrix product, whose gradient needs no other tensor of that size."""
    shape = (*rows_BCH1.shape[:3], columns_BC1W.shape[3])
    return (rows_BCH1.flatten(0, 1) @ columns_BC1W.flatten(0, 1)).view(shape)


def pointwise(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """Apply a 1 × 1 convolution to few positions, (B, C, H, W) → (B, D, H, W); ten times as fast as torch on a CPU."""
    return F.linear(x_BCHW.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def narrowed(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """Apply a 1 × 1 convolution with few output channels, (B, C, H, W) → (B, D, H, W); faster than torch's."""
    weight_BDC = conv.weight.flatten(1).expand(x_BCHW.shape[0], -1, -1)
    y_BDHW = (weight_BDC @ x_BCHW.flatten(2)).unflatten(2, x_BCHW.shape[2:])
    return y_BDHW if conv.bias is None else y_BDHW + conv.bias[:, None, None]


def thin(layer: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """Apply a convolution of few channels, or a depthwise one, in channels-last: two to six times as fast on a CPU."""
    last = torch.channels_last
    if x_BCHW.device.type != "cpu" or x_BCHW.is_contiguous(memory_format=last):
        return layer(x_BCHW)
    return layer(x_BCHW.contiguous(memory_format=last)).contiguous()
