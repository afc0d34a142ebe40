"""Self-attention under a custom mask, computed block by block.

Shapes: as in dense.py; G blocks of Q queries, each with K keys.
"""

import functools
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from visionattn.attention.self_attention.dense import MaskedAttention, cells
from visionattn.errors import UsageError


class BlockSparse(MaskedAttention):
    """Self-attention of patches under a custom mask; (query, key) blocks without an allowed pair are skipped.

        i → j  iff  allowed(row_i, column_i, row_j, column_j)

    CUDA tensors without dropout use `flex_attention` (Dong et al. 2024, 2412.05496). On other devices, `flex_attention`
    has no backward pass or does not run. Without `flex_attention`, the keys that a block of queries attends to are
    gathered, and one call computes all blocks with equally many keys. If one dense call with the mask costs less, that
    call is used instead.

    Args:
        num_heads: H; unused.
        allowed: (row, column of the query, row, column of the key) → bool. Its arguments are tensors that broadcast,
            and it may use elementwise functions of torch only. Every patch needs an allowed key. The mask must not
            change between calls.
        block: number of consecutive patches in a block (default: 64).

    Raises:
        ValueError: block is < 1.
        UsageError: when called, if `allowed` leaves a patch without a key.
    """

    def __init__(
        self, num_heads: int, *, allowed: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], block: int = 64
    ) -> None:
        super().__init__(num_heads)
        if block < 1:
            raise ValueError(f"block must be ≥ 1, got {block}")
        self.allowed = allowed
        self.block = block
        self._layouts: dict[tuple[tuple[int, int], torch.device], list[_Group] | None] = {}
        self._flex_masks: dict[tuple[tuple[int, int], int, torch.device], BlockMask] = {}

    def mask(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        rows, columns = cells(grid, device)
        return self.allowed(rows[:, None], columns[:, None], rows, columns).expand(len(rows), len(rows))

    def sparse(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        if q_BHND.is_cuda and not p:
            place = grid, prefix, q_BHND.device
            if place not in self._flex_masks:
                self._flex_masks[place] = self.flex_mask(*place)
            return _compiled_flex()(q_BHND, k_BHND, v_BHND, block_mask=self._flex_masks[place])
        key = grid, q_BHND.device
        if key not in self._layouts:
            self._layouts[key] = self._layout(*key)
        groups = self._layouts[key]
        if groups is None:
            return self.dense(q_BHND, k_BHND, v_BHND, grid, prefix, p)
        q_YND, k_YND, v_YND = (x[:, :, prefix:].flatten(0, 1) for x in (q_BHND, k_BHND, v_BHND))  # Y = B · H
        outputs = []
        for group in groups:
            q_GYQD = _gathered(q_YND, group.queries_GQ)
            k_GYKD, v_GYKD = (_gathered(x_YND, group.keys_GK) for x_YND in (k_YND, v_YND))
            mask_G1QK = group.mask_G1QK
            if prefix:
                first_k, first_v = (
                    x[:, :, :prefix].flatten(0, 1).expand(len(mask_G1QK), -1, -1, -1) for x in (k_BHND, v_BHND)
                )
                k_GYKD, v_GYKD = torch.cat([first_k, k_GYKD], 2), torch.cat([first_v, v_GYKD], 2)
                mask_G1QK = F.pad(mask_G1QK, (prefix, 0), value=True)
            out_GYQD = F.scaled_dot_product_attention(q_GYQD, k_GYKD, v_GYKD, attn_mask=mask_G1QK, dropout_p=p)
            outputs.append(out_GYQD.transpose(0, 1).flatten(1, 2))
        places_N = torch.cat([group.queries_GQ.flatten() for group in groups]).argsort()
        out_BHND = torch.cat(outputs, 1).index_select(1, places_N).unflatten(0, q_BHND.shape[:2])
        if prefix:
            prefix_BHPD = F.scaled_dot_product_attention(q_BHND[:, :, :prefix], k_BHND, v_BHND, dropout_p=p)
            out_BHND = torch.cat([prefix_BHPD, out_BHND], 2)
        return out_BHND

    def flex_mask(self, grid: tuple[int, int], prefix: int, device: torch.device) -> BlockMask:
        """Return the mask in the form of `flex_attention`, with prefix tokens."""
        tokens, width = prefix + grid[0] * grid[1], grid[1]

        def with_prefix(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            i, j = (query - prefix).clamp(min=0), (key - prefix).clamp(min=0)
            inside = self.allowed(i // width, i % width, j // width, j % width)
            return inside | (query < prefix) | (key < prefix)

        return create_block_mask(with_prefix, None, None, tokens, tokens, device=device)

    def _layout(self, grid: tuple[int, int], device: torch.device) -> "list[_Group] | None":
        """Return blocks of queries with the keys in their reach, or None if one dense call costs less."""
        rows_N, columns_N = cells(grid, device)
        blocks = torch.arange(len(rows_N), device=device).split(self.block)
        same_size = defaultdict(list)
        for queries_Q in blocks:
            mask_QN = self.allowed(rows_N[queries_Q, None], columns_N[queries_Q, None], rows_N, columns_N)
            mask_QN = mask_QN.expand(len(queries_Q), len(rows_N))
            if not mask_QN.any(1).all():
                cell = int(queries_Q[~mask_QN.any(1)][0])
                raise UsageError(
                    f"allowed leaves patch {divmod(cell, grid[1])} of a grid of {grid[0]}×{grid[1]} without a key; "
                    "allow at least one"
                )
            keys_K = torch.cat([keys for keys in blocks if mask_QN[:, keys].any()])
            same_size[len(queries_Q), len(keys_K)].append((queries_Q, keys_K, mask_QN[:, keys_K]))
        if sum(q * k * len(members) for (q, k), members in same_size.items()) * 1.5 > len(rows_N) ** 2:
            return None
        groups = ([torch.stack(part) for part in zip(*members, strict=True)] for members in same_size.values())
        return [_Group(queries, keys, mask[:, None]) for queries, keys, mask in groups]


@dataclass(frozen=True)
class _Group:
    """Blocks of queries with equally many keys: the indices of their queries and keys, and the mask between them."""

    queries_GQ: Tensor  # noqa: N815
    keys_GK: Tensor  # noqa: N815
    mask_G1QK: Tensor  # noqa: N815


def _gathered(x_YND: Tensor, index_GK: Tensor) -> Tensor:
    """Gather tokens by index: (Y, N, D), (G, K) → (G, Y, K, D)."""
    return x_YND.index_select(1, index_GK.flatten()).unflatten(1, tuple(index_GK.shape)).transpose(0, 1)


@functools.lru_cache(maxsize=1)
def _compiled_flex() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)
