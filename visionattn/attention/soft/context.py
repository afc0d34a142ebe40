"""Global contexts: features gathered with attention maps over positions, and returned to every position.

Shapes: B batch, C channels, H rows, W columns, N = H · W positions, M maps.
"""

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import GlobalContext as GlobalContextBlock
from timm.layers.lambda_layer import LambdaLayer
from torch import Tensor, nn

from visionattn.attention.soft.channel import _bottleneck, _divisor, _must_be_odd
from visionattn.attention.soft.gate_ops import narrowed, pointwise


class GlobalContext(nn.Module):
    """Global context (Cao et al. 2019, 1904.11492, eq. 5), with the weights of timm's `gca`.

        c   = sum over positions of x · softmax over positions of (w_k · x)
        out = x + W2 relu(LN(W1 c))

    Deviations from the paper: none.

    Args:
        channels: C of the input.
        reduction: C divided by the width of the bottleneck; the width is at least 4, since the bottleneck is normalised
            (default: 8).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        width = max(4, _bottleneck(channels, reduction))
        self.attention = GlobalContextBlock(channels, fuse_add=True, fuse_scale=False, rd_channels=width)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block: Any = self.attention  # timm's layers are not typed
        return x_BCHW + _of_context(block.mlp_add, _context(block.conv_attn, x_BCHW))


class GlobalContextGate(nn.Module):
    """Global context as a gate on x (`GlobalContext` adds the context to x), with the weights of timm's `gc`.

        c   = sum over positions of x · softmax over positions of (w_k · x)
        out = x · sigmoid(W2 relu(LN(W1 c)))

    This is the variant "scale" of the paper's table 1d (Cao et al. 2019, 1904.11492). Deviations from the paper: none.

    Args:
        channels: C of the input.
        reduction: C divided by the width of the bottleneck; the width is at least 4, since the bottleneck is normalised
            (default: 8).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        self.attention = GlobalContextBlock(channels, rd_channels=max(4, _bottleneck(channels, reduction)))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block: Any = self.attention  # timm's layers are not typed
        return x_BCHW * block.gate(_of_context(block.mlp_scale, _context(block.conv_attn, x_BCHW)))


class DoubleAttention(nn.Module):
    """Double attention, A² (Chen et al. 2018, 1810.11579, eq. 3–5): gather M contexts, and distribute them.

        G   = A softmax(B)ᵀ                     A, B = W_A x, W_B x; the softmax over positions
        out = x + W_Z (G softmax(V))            V = W_V x; the softmax over the M contexts of a position

    Deviations from the paper: none.

    Args:
        channels: C of the input.
        reduction: C divided by M, which is also the width of A; M is at least 1 (default: 4).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, reduction: int = 4) -> None:
        super().__init__()
        self.width = _bottleneck(channels, reduction)
        self.project = nn.Conv2d(channels, 3 * self.width, 1)
        self.restore = nn.Conv2d(self.width, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features_BMN, gather_BMN, distribute_BMN = self.project(x_BCHW).flatten(2).split(self.width, 1)
        context_BMM = features_BMN @ gather_BMN.softmax(2).transpose(1, 2)
        out_BMN = context_BMM @ distribute_BMN.softmax(1)
        return x_BCHW + self.restore(out_BMN.unflatten(2, x_BCHW.shape[2:]))


class Lambda(nn.Module):
    """Lambda layer (Bello 2021, 2102.08602, eq. 1–3, and its lambda convolution), with timm's weights.

        y[n] = (softmax(K)ᵀ V + sum over m near n of E[m − n] V[m])ᵀ q[n]         the softmax over positions

    q, K and V are projections of x; q and V are batch-normalised. E has r × r relative positions and is shared by the
    heads. The module replaces a 3 × 3 convolution, so it has no shortcut. The paper's intra-depth is 1 here. Deviations
    from the paper: none.

    Args:
        channels: C of the input.
        num_heads: heads of q (default: the greatest common divisor of C and 4).
        kernel_size: r, odd (default: 9).

    Shape: (B, C, H, W) → the same.
    """

    def __init__(self, channels: int, *, num_heads: int | None = None, kernel_size: int = 9) -> None:
        super().__init__()
        _must_be_odd(kernel_size)
        heads = _divisor(channels, num_heads, 4, "num_heads")
        self.attention = LambdaLayer(channels, num_heads=heads, r=kernel_size)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        block = self.attention
        query, key, value = block.qkv(x_BCHW).split([block.num_heads * block.dim_qk, block.dim_qk, block.dim_v], 1)
        # letters: h heads, k channels of q and K, v channels of V, n positions
        q_Bhkn = block.norm_q(query).flatten(2).unflatten(1, (block.num_heads, -1))
        value = block.norm_v(value)
        content_Bvk = value.flatten(2) @ F.softmax(key.flatten(2), -1).transpose(1, 2)
        # timm's conv3d of depth 1 as a conv2d: on some CPUs torch's bfloat16 gradient of conv3d is uninitialised memory
        conv = block.conv_lambda
        near = F.conv2d(value.flatten(0, 1)[:, None], conv.weight[..., 0], conv.bias, padding=conv.padding[:2])
        lambda_Bvkn = content_Bvk[..., None] + near.flatten(2).unflatten(0, (-1, block.dim_v))
        return torch.einsum("bhkn,bvkn->bhvn", q_Bhkn, lambda_Bvkn).flatten(1, 2).view_as(x_BCHW)


def _context(score: nn.Conv2d, x_BCHW: Tensor) -> Tensor:
    """Return the sum over positions of x, weighted by a softmax of the scores: (B, C, 1, 1)."""
    map_B1N = F.softmax(narrowed(score, x_BCHW).flatten(2), -1)
    return (x_BCHW.flatten(2) @ map_B1N.mT)[..., None]


def _of_context(mlp: Any, context_BC11: Tensor) -> Tensor:  # timm's ConvMlp, which is not typed
    return pointwise(mlp.fc2, mlp.act(mlp.norm(pointwise(mlp.fc1, context_BC11))))
