"""A gate on the output of self-attention.

Shapes: as in dense.py; C channels of a token.
"""

from typing import Literal

import torch
from torch import Tensor, nn


class OutputGate(nn.Module):
    """Multiplies the output of self-attention by gates that are computed from its input (Qiu et al. 2025, 2505.06708,
    eq. 5, at the place G1: after attention, before the output projection).

        out ⊙ 2 σ(W x + b)        W, b = 0 at first

    Deviation from the paper, which trains from scratch: the factor 2 and W, b = 0, so that all gates are 1 at first and
    the outputs of a trained network do not change. A gate that closes lets a head contribute nothing, so that it needs
    no token as a sink of its attention.

    Args:
        channels: C.
        num_heads: H.
        head_dim: D.
        per: `"channel"` computes a gate for each channel of each head (the paper's elementwise gate), `"head"` one for
            each head (headwise).

    Raises:
        ValueError: per is neither.

    Shape: out (B, H, N, D), x (B, N, C) → (B, H, N, D)
    """

    def __init__(self, channels: int, num_heads: int, head_dim: int, *, per: Literal["head", "channel"]) -> None:
        super().__init__()
        if per not in ("head", "channel"):
            raise ValueError(f"gate must be head or channel, got {per!r}")
        self.num_heads = num_heads
        self.linear = nn.Linear(channels, num_heads * (head_dim if per == "channel" else 1))
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, out_BHND: Tensor, x_BNC: Tensor) -> Tensor:
        gate_BNX = 2 * torch.sigmoid(self.linear(x_BNC))
        return out_BHND * gate_BNX.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
