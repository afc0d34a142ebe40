"""Where tokens lie in the image, window by window, and how a call of attention is laid out.

Shapes: B images, W windows, N tokens, Q queries, K keys, h × w grid.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["self", "cross"]
_NEAR = 2e-4  # positions are fractions of the image; grids of up to some thousand cells a side are told apart


@dataclass(frozen=True)
class Tokens:
    """Where the tokens of each window lie on the grid.

    Attributes:
        grid: (h, w).
        index_WN: (W, N) int64, the cell row · w + column of every token; −1 for class and register tokens and padding.
    """

    grid: tuple[int, int]
    index_WN: Tensor  # noqa: N815

    @cached_property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first that lies on the grid."""
        placed = (self.index_WN >= 0).any(0)
        first = int(placed.int().argmax()) if placed.any() else len(placed)
        return first if placed[first:].all() else 0  # tokens without a place among the others are padding

    @property
    def windowed(self) -> bool:
        return len(self.index_WN) > 1

    @cached_property
    def in_order(self) -> bool:
        """Whether the tokens are a prefix and then the grid, row by row, as a ViT's are."""
        cells = torch.arange(self.grid[0] * self.grid[1])
        return not self.windowed and torch.equal(self.index_WN[0, self.num_prefix_tokens :], cells)

    def sum_to_grid(self, values_BWN: Tensor) -> Tensor:
        """Put one value a token on the grid, (B, h, w); cells met more than once hold the sum, cells never met 0."""
        height, width = self.grid
        if self.in_order:
            return values_BWN[:, 0, self.num_prefix_tokens :].reshape(-1, height, width)
        total = values_BWN.new_zeros(len(values_BWN), height * width + 1)
        values = values_BWN.expand(-1, len(self.index_WN), -1).reshape(len(values_BWN), -1)
        return total.index_add_(1, self._places.to(values.device), values)[:, :-1].reshape(-1, height, width)

    def to_grid(self, values_BWN: Tensor) -> Tensor:
        """As `sum_to_grid`, cells met more than once holding the mean."""
        summed_Bhw = self.sum_to_grid(values_BWN)
        if self.in_order:
            return summed_Bhw
        count = torch.bincount(self._places, minlength=summed_Bhw[0].numel() + 1)[:-1].clamp(min=1)
        return summed_Bhw / count.reshape(self.grid).to(summed_Bhw.device)

    @property
    def _places(self) -> Tensor:
        """Cell of every token; those without a place go to one behind the grid, which is cut off."""
        return torch.where(self.index_WN < 0, self.grid[0] * self.grid[1], self.index_WN).flatten()


@dataclass(frozen=True)
class Site:
    """One call of attention in the model.

    Attributes:
        name: dotted name of the module that attends.
        kind: `"self"` where the queries lie in the image as the keys do; `"cross"` where they are class tokens alone or
            learned.
        heads: number of heads.
        queries: where the queries lie; None where they have no place (class tokens, learned queries).
        keys: where the keys lie.
        fused: a call of scaled_dot_product_attention, not of softmax.
        lead: sizes of the axes before queries and keys, for one image.
        windows: which of these axes run over windows.
        axis: the axis of the softmax; None where fused.
        context: a softmax of one score a position, with no queries.
        class_query: index of the class token, or of the only query, among the queries; None where there is none.
    """

    name: str
    kind: Kind
    heads: int
    queries: Tokens | None
    keys: Tokens
    fused: bool
    lead: tuple[int, ...]
    windows: tuple[int, ...]
    axis: int | None = None
    context: bool = False
    class_query: int | None = None

    @property
    def grid(self) -> tuple[int, int]:
        return self.keys.grid

    @property
    def windowed(self) -> bool:
        return self.keys.windowed

    @property
    def num_prefix_tokens(self) -> int:
        return self.keys.num_prefix_tokens

    def canonical(self, values: Tensor) -> Tensor:
        """Bring (B · lead[0], *lead[1:], Q, K) to (B, W, heads, Q, K)."""
        if values.ndim != len(self.lead) + 2 or values.shape[1 : len(self.lead)] != self.lead[1:]:
            raise LayoutError(f"{self.name} now has the shape {tuple(values.shape)}, and had (B · {self.lead}, …)")
        if len(self.lead) == 2 and self.lead[0] == 1 and not self.windows:
            return values[:, None]
        batch, rest = divmod(values.shape[0], self.lead[0])
        if rest:
            raise LayoutError(f"{self.name} now has {values.shape[0]} windows, no multiple of {self.lead[0]}")
        values = values.unflatten(0, (batch, self.lead[0]))
        windows = [axis + 1 for axis in self.windows]
        heads = [axis + 1 for axis in range(len(self.lead)) if axis not in self.windows]
        if windows + heads != list(range(1, len(self.lead) + 1)):
            values = values.permute(0, *windows, *heads, values.ndim - 2, values.ndim - 1)
        count = math.prod(self.lead[axis] for axis in self.windows)
        return values.reshape(batch, count, math.prod(self.lead) // count, *values.shape[-2:])


class LayoutError(RuntimeError):
    """A call has another shape than the survey saw."""


@dataclass(frozen=True)
class Activation:
    """An output that lies on a grid: a feature map, or tokens.

    Attributes:
        name: dotted name of the module that returns it.
        tokens: where each position lies; W is 1 unless the module works inside windows.
        channel_axis: of the output.
        time: how many events lay before it.
    """

    name: str
    tokens: Tokens
    channel_axis: int
    time: int


def varies(positions_: Tensor | None, axis: int) -> bool:
    """Whether positions differ along an axis."""
    if positions_ is None or positions_.stride(axis) == 0 or positions_.shape[axis] == 1:
        return False
    for other in range(positions_.ndim):  # expanded axes hold nothing new
        if positions_.stride(other) == 0:
            positions_ = positions_.narrow(other, 0, 1)
    parts = torch.view_as_real(positions_)
    low, high = (parts.nan_to_num(bad).aminmax(dim=axis % positions_.ndim) for bad in (9.0, -9.0))
    return bool((high.max - low.min > _NEAR).any())


def per_window(positions_: Tensor, windows: tuple[int, ...], lead: int) -> Tensor:
    """Positions (W, N) from (*lead, N): axes that do not run over windows hold the same."""
    for axis in reversed(range(lead)):
        if axis not in windows:
            positions_ = positions_.select(axis, 0)
    return positions_.reshape(-1, positions_.shape[-1])


def infer_tokens(positions_WN: Tensor) -> Tokens | None:
    """Infer the grid from the positions that occur."""
    known = ~positions_WN.isnan()
    if not known.any():
        return None
    index = torch.zeros(positions_WN.shape, dtype=torch.long, device=positions_WN.device)
    sizes = []
    for part in (positions_WN.real, positions_WN.imag):
        values = part[known].sort().values
        starts = torch.cat([values[:1], values[1:][values.diff() > _NEAR]])
        sizes.append(len(starts))
        place = torch.searchsorted(starts, part.nan_to_num(0).contiguous() + _NEAR / 2).clamp(min=1) - 1
        index = index * len(starts) + place
    if sizes[0] * sizes[1] > 2 * int(known.sum()) + 2:
        return None
    index = torch.where(known, index, -1)
    return Tokens((sizes[0], sizes[1]), index.cpu())


def infer_layout(positions_: Tensor) -> tuple[Tokens, int] | None:
    """Read a (1, C, h, w) or (1, h, w, C) map, or (1, N, C) tokens: where they lie, and which axis is C."""
    if positions_.ndim not in (3, 4) or len(positions_) != 1:
        return None
    for axis in (1, positions_.ndim - 1):
        if varies(positions_, axis):
            continue
        cells = positions_.select(axis, 0).reshape(1, -1)
        if not varies(cells, -1):
            return None
        tokens = infer_tokens(cells)
        return None if tokens is None else (tokens, axis)
    return None
