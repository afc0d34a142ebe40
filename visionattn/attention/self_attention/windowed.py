"""Self-attention inside windows of a grid.

Shapes: B batch, H heads, N tokens, D channels of a head.
"""

import torch
from torch import Tensor

from visionattn.attention.self_attention.block_attention import Run, attend
from visionattn.attention.self_attention.dense import MaskedAttention, cells, in_blocks


class Windowed(MaskedAttention):
    """Self-attention of patches inside windows (Liu et al. 2021, Swin, 2103.14030, §3.2), without a position bias.

        i → j  iff  ⌊(row_i − s) / window⌋ = ⌊(row_j − s) / window⌋, and the columns likewise;    s the shift

    Windows at the edges are smaller if the grid ends inside them, which equals the paper's rolling and masking.
    Deviations from the paper: no position bias; `shift` is an argument. To shift every second layer, give
    `swap_attention` two factories.

    Args:
        num_heads: H; unused.
        window: rows and columns of a window.
        shift: row and column at which the first whole window begins, in [0, window) (default: 0).

    Raises:
        ValueError: window or shift is out of its range.
    """

    def __init__(self, num_heads: int, *, window: int, shift: int = 0) -> None:
        super().__init__(num_heads)
        if window < 1 or not 0 <= shift < window:
            raise ValueError(f"window must be ≥ 1 and shift in [0, window), got {window} and {shift}")
        self.window = window
        self.shift = shift

    def mask(self, grid: tuple[int, int], device: torch.device) -> Tensor:
        row_N, column_N = cells(grid, device)
        rows, columns = ((part - self.shift).div(self.window, rounding_mode="floor") for part in (row_N, column_N))
        return (rows[:, None] == rows) & (columns[:, None] == columns)

    def sparse(
        self, q_BHND: Tensor, k_BHND: Tensor, v_BHND: Tensor, grid: tuple[int, int], prefix: int, p: float
    ) -> Tensor:
        rows, columns = (self._runs(size) for size in grid)
        if all(len(runs) == 1 and runs[0].count == 1 for runs in (rows, columns)):  # one window holds the whole grid
            return attend(q_BHND, k_BHND, v_BHND, None, p)
        return in_blocks(q_BHND, k_BHND, v_BHND, grid, prefix, (rows, columns), lambda row, column: None, p)

    def _runs(self, size: int) -> tuple[Run, ...]:
        """Return the part before the first whole window, the whole windows, and the rest."""
        first = min(self.shift, size)
        count, rest = (size - first) // self.window, (size - first) % self.window  # torch 2.6 cannot compile divmod
        cuts = (0, 1, first), (first, count, self.window), (size - rest, 1, rest)
        return tuple(Run(n, block, start, block, 0, ((0, block),) * block) for start, n, block in cuts if n and block)
