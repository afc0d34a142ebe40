"""Self-attention of every patch to the k × k patches around it, with dilation and stride.

Shapes: as in dense.py; R residues of a dilation, in an axis or in both.
"""

from collections.abc import Sequence
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.attention.self_attention.block_attention import Run, Runs, plan
from visionattn.attention.self_attention.dense import MaskedAttention, attend_masked, in_blocks


class Neighbourhood(MaskedAttention):
    """Neighbourhood attention (Hassani et al. 2023, 2204.07143, eq. 2–4), with dilation (Hassani & Shi 2022,
    2209.15001, §3) and stride (Hassani et al. 2025, 2504.16922, §3), without the papers' position bias.

        i → j  iff  i ≡ j (mod d)  and  start(⌊i / d⌋) ≤ ⌊j / d⌋ < start(⌊i / d⌋) + k,  for the rows and the columns
        start(a) = clip(leader(a) − ⌊k / 2⌋, 0, n − k)              n: number of rows (columns) with a's residue
        leader(a) = min(⌊a / s⌋ s + ⌊s / 2⌋, n − 1)

    At the edges the neighbourhood moves inwards, so that every patch attends to k × k patches; if there are fewer than
    k rows (columns), to all of them. With a dilation d, a patch attends to every d-th row and column. With a stride s,
    the s × s patches of a group have the same neighbourhood, that of the patch in the middle of the group; so s = 1 is
    neighbourhood attention, and s = k is attention in windows. A larger stride needs fewer products.

    Attention is computed in blocks of patches, each with the rectangle of keys that the block reaches. If one call over
    all patches of a residue costs less, that call is used instead; both are exact. Deviation from the papers: no
    position bias.

    Args:
        num_heads: H; unused.
        size: k; with an even size, the neighbourhood has one patch less after its leader than before.
        dilation: d ≥ 1 (default: 1).
        stride: s, at most `size` (default: 1).

    Raises:
        ValueError: size or dilation is < 1, or stride is not in [1, size].
    """

    def __init__(self, num_heads: int, *, size: int, dilation: int = 1, stride: int = 1) -> None:
        super().__init__(num_heads)
        if size < 1 or dilation < 1:
            raise ValueError(f"size and dilation must be ≥ 1, got {size} and {dilation}")
        if not 1 <= stride <= size:
            raise ValueError(f"stride must be in [1, size], got {stride} with size {size}")
        self.size = size
        self.dilation = dilation
        self.stride = stride

    def extra_repr(self) -> str:
        return f"size={self.size}, dilation={self.dilation}, stride={self.stride}"

    def mask(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        return _mask(grid, self.size, self.stride, self.dilation, device)

    def sparse(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        if self.dilation == 1:
            return self._local((q_BHND, k_BHND, v_BHND), grid, prefix, p)
        first, parts, order = [x[:, :, :prefix] for x in (q_BHND, k_BHND, v_BHND)], [], []
        for rows_Rr, columns_Sc in product(*(_residues(extent, self.dilation, q_BHND.device) for extent in grid)):
            patch_RSrc = rows_Rr[:, None, :, None] * grid[1] + columns_Sc[None, :, None, :]
            patch_RN = patch_RSrc.flatten(0, 1).flatten(1)
            batches = [
                torch.cat([x[:, None].expand(-1, len(patch_RN), -1, -1, -1), own.movedim(2, 1)], 3).flatten(0, 1)
                for x, own in zip(
                    first, (x[:, :, prefix:][:, :, patch_RN] for x in (q_BHND, k_BHND, v_BHND)), strict=True
                )
            ]
            out = self._local(batches, (rows_Rr.shape[1], columns_Sc.shape[1]), prefix, p)
            parts.append(out[:, :, prefix:].unflatten(0, (-1, len(patch_RN))).movedim(1, 2).flatten(2, 3))
            order.append(patch_RN.flatten())
        out_BHND = torch.cat(parts, 2)[:, :, torch.cat(order).argsort()]
        if prefix:
            prefix_BHPD = F.scaled_dot_product_attention(first[0], k_BHND, v_BHND, dropout_p=p)
            out_BHND = torch.cat([prefix_BHPD, out_BHND], 2)
        return out_BHND

    def _local(self, qkv_BHND: Sequence[Tensor], grid: tuple[int, int], prefix: int, p: float) -> Tensor:
        """Compute attention without dilation."""
        q_BHND, k_BHND, v_BHND = qkv_BHND
        device = q_BHND.device
        runs = blocks(grid, self.size, self.stride) if max(grid) > self.size else None
        if runs is None:
            return attend_masked(q_BHND, k_BHND, v_BHND, _mask(grid, self.size, self.stride, 1, device), prefix, p)

        def near(row: Run, column: Run) -> Tensor:
            both = row.allowed(device)[:, None, :, None] & column.allowed(device)[None, :, None]
            return both.flatten(2).flatten(0, 1)

        return in_blocks(q_BHND, k_BHND, v_BHND, grid, prefix, runs, near, p)


def neighbours(size: int, k: int, stride: int = 1) -> list[tuple[int, int]]:
    """Return the k rows that each of `size` rows attends to, as the first row and the row after the last."""
    k = min(k, size)
    leaders = (min(row // stride * stride + stride // 2, size - 1) for row in range(size))
    starts = (min(max(leader - k // 2, 0), size - k) for leader in leaders)
    return [(start, start + k) for start in starts]


def blocks(grid: tuple[int, int], k: int, stride: int = 1) -> Runs | None:
    """Return blocks for attention of every patch to k × k patches, see `Neighbourhood`; None if one call costs less."""
    return plan(*(neighbours(size, k, stride) for size in grid))


def _mask(grid: tuple[int, int], k: int, stride: int, dilation: int, device: torch.device) -> Tensor | None:
    """Return which patches each patch attends to, (h · w, h · w) bool; None if every patch attends to all."""
    if max(grid) <= k and dilation == 1:
        return None
    rows, columns = (_near(extent, k, stride, dilation, device) for extent in grid)
    return (rows[:, None, :, None] & columns[None, :, None, :]).flatten(2).flatten(0, 1)


def _near(extent: int, k: int, stride: int, dilation: int, device: torch.device) -> Tensor:
    """Return which rows each of `extent` rows attends to, (extent, extent) bool."""
    near = torch.zeros(extent, extent, dtype=torch.bool, device=device)
    for rows_Rr in _residues(extent, dilation, device):
        low, high = torch.tensor(neighbours(rows_Rr.shape[1], k, stride), device=device).T[..., None]
        other = torch.arange(rows_Rr.shape[1], device=device)
        near[rows_Rr[:, :, None], rows_Rr[:, None]] = (low <= other) & (other < high)
    return near


def _residues(extent: int, dilation: int, device: torch.device) -> list[Tensor]:
    """Return the rows of every residue of the dilation, (R, r), in at most two groups of different r."""
    row = torch.arange(extent, device=device)
    longer, groups = extent % dilation, []
    for first, last, count in ((0, longer, extent // dilation + 1), (longer, dilation, extent // dilation)):
        if count and last > first:
            groups.append(row[first:last, None] + dilation * torch.arange(count, device=device))
    return groups
