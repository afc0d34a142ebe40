"""Base classes of the forms of self-attention over a grid of tokens, and the forms Dense, PooledKeys and TopK.

A form is built from a number of heads. It is called with q, k and v, as a transformer's projections return them, and
with the grid of the patch tokens. `swap_attention` puts a form into a ViT. In every form, prefix tokens (class,
registers) come before the grid and attend to all tokens, and all tokens attend to them.

Shapes: B batch, H heads, N tokens = P prefix tokens and h · w patches row by row, D channels of a head.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.self_attention.block_attention import Run, Runs, attend, attend_in_blocks
from visionattn.errors import UsageError


class SelfAttention(nn.Module, ABC):
    """Base of the forms of self-attention: combines q, k and v.

    Args:
        num_heads: H. Most forms ignore this argument, but `swap_attention` builds every form with it.

    Raises:
        ValueError: num_heads is < 1.
        UsageError: when called, if the number of tokens does not match the grid.

    Shape: q, k, v (B, H, N, D) → (B, H, N, D), N = num_prefix_tokens + rows · columns of the grid.
    """

    def __init__(self, num_heads: int) -> None:
        super().__init__()
        if num_heads < 1:
            raise ValueError(f"num_heads must be ≥ 1, got {num_heads}")
        self.num_heads = num_heads

    def forward(
        self,
        q_BHND: Tensor,
        k_BHND: Tensor,
        v_BHND: Tensor,
        *,
        grid: tuple[int, int],
        num_prefix_tokens: int = 0,
        dropout_p: float = 0.0,
    ) -> Tensor:
        """Combine q, k and v; `grid` is (rows, columns), and `dropout_p` the dropout of the attention weights."""
        tokens = q_BHND.shape[2]
        if tokens != num_prefix_tokens + grid[0] * grid[1]:
            raise UsageError(
                f"{type(self).__name__} needs every token of the grid: {grid[0]}×{grid[1]} patches and "
                f"{num_prefix_tokens} prefix tokens, got {tokens}; set options that drop tokens (patch_drop_rate) to 0"
            )
        return self.attend(q_BHND, k_BHND, v_BHND, grid, num_prefix_tokens, dropout_p)

    @abstractmethod
    def attend(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        """Compute the output; `prefix` is the number of prefix tokens, `p` the dropout of the weights."""


class MaskedAttention(SelfAttention):
    """Base of the forms that equal dense attention with a mask, but do not compute the masked pairs."""

    def attend(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        return self.sparse(q_BHND, k_BHND, v_BHND, grid, prefix, p)

    def dense(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        """Compute the output in one call over all tokens with a mask, at the cost of dense attention."""
        return attend_masked(q_BHND, k_BHND, v_BHND, self.mask(grid, q_BHND.device), prefix, p)

    @abstractmethod
    def mask(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        """Return the mask of patches, without prefix tokens.

        Returns:
            (h · w, h · w) bool, or (H, h · w, h · w), added to the logits; None if every pair is allowed.
        """

    @abstractmethod
    def sparse(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        """Compute the output, at a cost that depends on the number of allowed pairs."""


class Dense(SelfAttention):
    """Dense self-attention: every token attends to every token (Vaswani et al. 2017, 1706.03762, eq. 1).

    out = softmax(q kᵀ / √D) v
    """

    def attend(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, dropout_p=p)


class PooledKeys(SelfAttention):
    """Self-attention whose keys and values are means over k × k patches.

        out = softmax(q pool(k)ᵀ / √D) pool(v)        pool: mean over k × k patches (fewer at the edges)

    PVTv2's linear attention pools in this way (Wang et al. 2022, 2106.13797, §3.1). Deviations from the paper: the
    pooled cells have a fixed size instead of a fixed number; keys and values are pooled after their projections,
    without learned weights or normalisation, so that weights of dense attention can be used.

    Args:
        num_heads: H; unused.
        pool: k.

    Raises:
        ValueError: pool is < 1.
    """

    def __init__(self, num_heads: int, *, pool: int) -> None:
        super().__init__(num_heads)
        if pool < 1:
            raise ValueError(f"pool must be ≥ 1, got {pool}")
        self.pool = pool

    def attend(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        k_BHMD, v_BHMD = (self._pooled(x, grid, prefix) for x in (k_BHND, v_BHND))
        return F.scaled_dot_product_attention(q_BHND, k_BHMD, v_BHMD, dropout_p=p)

    def _pooled(self, x_BHND: Tensor, grid: tuple[int, int], prefix: int) -> Tensor:
        x_BXhw = x_BHND[:, :, prefix:].transpose(2, 3).unflatten(3, grid).flatten(1, 2)
        pooled_BXhw = F.avg_pool2d(x_BXhw, self.pool, ceil_mode=True, count_include_pad=False)
        pooled_BHMD = pooled_BXhw.flatten(2).unflatten(1, (x_BHND.shape[1], -1)).transpose(2, 3)
        return torch.cat([x_BHND[:, :, :prefix], pooled_BHMD], 2) if prefix else pooled_BHMD


class TopK(SelfAttention):
    """Self-attention in which every patch attends to the k patches with the largest logits, in each head.

        i → j  iff  q_i · k_j is among the k largest of row i, or ties with the k-th

    See Zhao et al. 2019, 1912.11637, eq. 2–3. The selection has no gradient; the weights of the selected patches have
    one. This saves no time, since the selection needs all products. Deviation from the paper: patches also attend to
    prefix tokens, in addition to the k patches, and prefix tokens attend to all tokens.

    Args:
        num_heads: H; unused.
        k: number of patches that each patch attends to; if the grid has at most k patches, all of them.

    Raises:
        ValueError: k is < 1.
    """

    def __init__(self, num_heads: int, *, k: int) -> None:
        super().__init__(num_heads)
        if k < 1:
            raise ValueError(f"k must be ≥ 1, got {k}")
        self.k = k

    def attend(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        mask = None
        if self.k < grid[0] * grid[1]:
            with torch.no_grad():
                scores_BHNN = q_BHND[:, :, prefix:] @ k_BHND[:, :, prefix:].mT
                mask = scores_BHNN >= scores_BHNN.topk(self.k, -1).values[..., -1:]
                mask = F.pad(mask, (prefix, 0, prefix, 0), value=True) if prefix else mask
        return F.scaled_dot_product_attention(q_BHND, k_BHND, v_BHND, attn_mask=mask, dropout_p=p)


def cells(grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the row and the column of every patch, (h · w,) each."""
    cell_N = torch.arange(grid[0] * grid[1], device=device)
    return cell_N // grid[1], cell_N % grid[1]


def attend_masked(q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, mask: Tensor | None, prefix: int, p: float) -> Tensor:
    """Compute attention of all tokens in one call, with a mask of the patches as `MaskedAttention.mask` returns it."""
    if mask is not None:
        value = True if mask.dtype == torch.bool else 0.0
        mask = F.pad(mask, (prefix, 0, prefix, 0), value=value) if prefix else mask
        mask = mask if mask.dtype == torch.bool else mask.to(q_BHND.dtype)
    return attend(q_BHND, k_BHND, v_BHND, mask, p)


def in_blocks(
    q_BHND: Tensor,
    k_BHND: Tensor,
    v_BHND: Tensor,
    grid: tuple[int, int],
    prefix: int,
    runs: Runs,
    bias: Callable[[Run, Run], Tensor | None],
    p: float,
) -> Tensor:
    """Compute attention of patches to patches (block by block) and to the prefix, and of the prefix to all tokens."""
    # transformers store all heads of a token together, so these transposed tensors are in memory order
    parts_BhwHD = [x[:, :, prefix:].transpose(1, 2).unflatten(1, grid) for x in (q_BHND, k_BHND, v_BHND)]
    out_BhwHD = attend_in_blocks(parts_BhwHD, [x[:, :, :prefix] for x in (k_BHND, v_BHND)], runs, bias, p)
    out_BNHD = out_BhwHD.flatten(1, 2)
    if prefix:
        prefix_BHPD = F.scaled_dot_product_attention(q_BHND[:, :, :prefix], k_BHND, v_BHND, dropout_p=p)
        out_BNHD = torch.cat([prefix_BHPD.transpose(1, 2), out_BNHD], 1)
    return out_BNHD.transpose(1, 2)
