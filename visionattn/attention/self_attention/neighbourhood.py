"""Self-attention of every patch to the k × k patches around it.

Shapes: as in dense.py.
"""

import torch
from torch import Tensor

from visionattn.attention.self_attention.block_attention import Run, Runs, plan
from visionattn.attention.self_attention.dense import MaskedAttention, cells, in_blocks


class Neighbourhood(MaskedAttention):
    """Neighbourhood attention (Hassani et al. 2023, 2204.07143, eq. 2–4) without the paper's position bias.

        i → j  iff  start(row_i) ≤ row_j < start(row_i) + k, and the columns likewise
        start(i) = clip(i − ⌊k / 2⌋, 0, size − k)

    At the edges the neighbourhood moves inwards, so that every patch attends to k × k patches. On a grid with fewer
    than k rows (columns), it attends to all rows (columns). Attention is computed in blocks of patches, each with the
    rectangle of keys that the block reaches. If one call over all patches costs less, that call is used instead; both
    are exact. Deviation from the paper: no position bias.

    Args:
        num_heads: H; unused.
        size: k, odd.

    Raises:
        ValueError: size is even or < 1.
    """

    def __init__(self, num_heads: int, *, size: int) -> None:
        super().__init__(num_heads)
        if size < 1 or size % 2 == 0:
            raise ValueError(f"size must be odd and ≥ 1, got {size}")
        self.size = size

    def mask(self, grid: tuple[int, int], device: torch.device) -> Tensor | None:
        if max(grid) <= self.size:
            return None
        near = torch.ones((), dtype=torch.bool, device=device)
        for size, cell_N in zip(grid, cells(grid, device), strict=True):
            low, high = torch.tensor(neighbours(size, self.size), device=device)[cell_N].T[..., None]
            near = near & (low <= cell_N) & (cell_N < high)
        return near

    def sparse(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        runs = blocks(grid, self.size) if max(grid) > self.size else None
        if runs is None:
            return self.dense(q_BHND, k_BHND, v_BHND, grid, prefix, p)
        device = q_BHND.device

        def near(row: Run, column: Run) -> Tensor:
            both = row.allowed(device)[:, None, :, None] & column.allowed(device)[None, :, None]
            return both.flatten(2).flatten(0, 1)

        return in_blocks(q_BHND, k_BHND, v_BHND, grid, prefix, runs, near, p)


def neighbours(size: int, k: int) -> list[tuple[int, int]]:
    """Return the k nearest rows of each of `size` rows, as the first row and the row after the last."""
    k = min(k, size)
    starts = (min(max(i - k // 2, 0), size - k) for i in range(size))
    return [(start, start + k) for start in starts]


def blocks(grid: tuple[int, int], k: int) -> Runs | None:
    """Return blocks for attention of every patch to the k × k nearest patches; see `plan`."""
    return plan(*(neighbours(size, k) for size in grid))
