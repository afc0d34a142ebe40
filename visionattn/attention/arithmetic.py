"""Arithmetic of gates, in the form whose gradient makes few passes over the features.

Where a gate costs, it is in reading and writing tensors of the features' size, most of them in the backward pass.

Shapes: B batch, C channels, H rows, W columns, D channels out.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mean(x: Tensor, *dims: int) -> Tensor:
    """Mean over dims, which are kept with size 1; torch's own writes its gradient out at the size of x."""
    wide = torch.promote_types(x.dtype, torch.float32)  # a sum may be beyond half precision
    return (x.sum(dims, keepdim=True, dtype=wide) / math.prod([x.shape[dim] for dim in dims])).to(x.dtype)


def maximum(x_BCHW: Tensor) -> Tensor:
    """Maximum over positions, (B, C, 1, 1); its gradient costs half of that of amax, which looks for ties."""
    return x_BCHW.flatten(2).max(2).values[..., None, None]


def outer(rows_BCH1: Tensor, columns_BC1W: Tensor) -> Tensor:
    """rows · columns, (B, C, H, W), whose gradient needs no product of that size."""
    shape = (*rows_BCH1.shape[:3], columns_BC1W.shape[3])
    return (rows_BCH1.flatten(0, 1) @ columns_BC1W.flatten(0, 1)).view(shape)


def pointwise(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """A 1 × 1 convolution of few positions, (B, D, H, W); torch's is ten times as slow there on a CPU."""
    return F.linear(x_BCHW.permute(0, 2, 3, 1), conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


def narrowed(conv: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """A 1 × 1 convolution of many positions to few channels, (B, D, H, W); torch's is slow there too."""
    weight_BDC = conv.weight.flatten(1).expand(len(x_BCHW), -1, -1)
    y_BDHW = (weight_BDC @ x_BCHW.flatten(2)).unflatten(2, x_BCHW.shape[2:])
    return y_BDHW if conv.bias is None else y_BDHW + conv.bias[:, None, None]


def thin(layer: Callable[[Tensor], Tensor], x_BCHW: Tensor) -> Tensor:
    """A convolution of few channels, or of each alone; with channels last it is two to six times as fast on a CPU."""
    last = torch.channels_last
    if x_BCHW.device.type != "cpu" or x_BCHW.is_contiguous(memory_format=last):
        return layer(x_BCHW)
    return layer(x_BCHW.contiguous(memory_format=last)).contiguous()
