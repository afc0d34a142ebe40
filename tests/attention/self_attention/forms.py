"""Inputs for the tests of self-attention, and a counter of computed products."""

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

F = nn.functional


def qkv(grid, prefix, *, batch=2, heads=2, width=8, dtype=torch.float32):
    """Make q, k and v in a transformer's memory layout, with all heads of a token together."""
    torch.manual_seed(0)
    x = torch.randn(3, batch, prefix + grid[0] * grid[1], heads, width).to(dtype).transpose(2, 3)
    return [part.detach().requires_grad_() for part in x]


class ProductCounter(TorchFunctionMode):
    """Count the query-key products in calls of `scaled_dot_product_attention`."""

    products = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.products += args[0].shape[:-1].numel() * args[1].shape[-2]
        return func(*args, **(kwargs or {}))
