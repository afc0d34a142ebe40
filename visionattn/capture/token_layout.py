"""Where tokens lie in the image, window by window, and how a call of attention is laid out.

Shapes: B images, W windows, N tokens, Q queries, K keys, h × w grid of G cells.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

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
        index_BWN: the same of each image, where the model chooses its tokens by what the image shows; index_WN is that
            of the first image then. None where all images are alike.
        home_BG: (B, G) int64 of each image, where tokens were merged: in which cell the token lies that the token of a
            cell was merged into; for all others the cell itself. None where none were merged.
    """

    grid: tuple[int, int]
    index_WN: Tensor  # noqa: N815
    index_BWN: Tensor | None = None  # noqa: N815
    home_BG: Tensor | None = None  # noqa: N815

    @cached_property
    def num_prefix_tokens(self) -> int:
        """Tokens before the first that lies on the grid."""
        placed = (self.index_WN >= 0).any(0)
        first = int(placed.int().argmax()) if placed.any() else len(placed)
        beyond = len(placed) - int(placed.flip(0).int().argmax())  # a token made of all that were dropped may be last
        return first if placed[first:beyond].all() else 0  # tokens without a place among the others are padding

    @property
    def windowed(self) -> bool:
        return len(self.index_WN) > 1

    @cached_property
    def in_order(self) -> bool:
        """Whether the tokens are a prefix and then the grid, row by row, as a ViT's are."""
        cells = torch.arange(self.grid[0] * self.grid[1])
        alike = not self.windowed and self.index_BWN is None
        return alike and torch.equal(self.index_WN[0, self.num_prefix_tokens :], cells)

    def of_image(self, number: int) -> "Tokens":
        """Where those of one image lie."""
        if self.index_BWN is None:
            return self
        home = None if self.home_BG is None else self.home_BG[number : number + 1]
        return Tokens(self.grid, self.index_BWN[number], home_BG=home)

    def some(self, tokens_N: Tensor) -> "Tokens":
        """Some of the tokens, by a mask."""
        each = None if self.index_BWN is None else self.index_BWN[:, :, tokens_N]
        return Tokens(self.grid, self.index_WN[:, tokens_N], each, self.home_BG)

    def images(self, count: int) -> Tensor:
        """(B, W, N) of so many images, as `index_WN`."""
        index = self.index_WN[None] if self.index_BWN is None else self.index_BWN
        return index.expand(count, *self.index_WN.shape)

    def of_cell(self, cell: int, count: int) -> Tensor:
        """Which token is that of a cell, or was made of it, (B, W, N) of so many images."""
        if self.home_BG is None:
            return self.images(count) == cell
        return self.images(count) == self.home_BG[:, cell, None, None]

    def sum_to_grid(self, values_BWN: Tensor) -> Tensor:
        """Put one value a token on the grid, (B, h, w); cells met more than once hold the sum, cells never met 0.

        The value of a token that others were merged into is shared out evenly among their cells and its own.
        """
        height, width = self.grid
        if self.in_order:
            return values_BWN[:, 0, self.num_prefix_tokens :].reshape(-1, height, width)
        total = values_BWN.new_zeros(values_BWN.shape[0], height * width + 1)
        values = values_BWN.expand(-1, len(self.index_WN), -1).reshape(values_BWN.shape[0], -1)
        if self.index_BWN is None:
            total.index_add_(1, self._places(self.index_WN).flatten().to(values.device), values)
        else:
            total.scatter_add_(1, self._places(self.index_BWN).flatten(1).to(values.device), values)
        total = total[:, :-1]
        if self.home_BG is not None:
            home = self.home_BG.expand(total.shape[0], -1).to(total.device)
            total = (total / self._sizes.to(total.device)).gather(1, home)
        return total.reshape(-1, height, width)

    def read(self, cells_Bhw: Tensor) -> Tensor:
        """What the cells of each token hold together, (B, W, N): the way back from `sum_to_grid`. Cells met by several
        tokens are shared among them; a token without a place has nothing."""
        cells = cells_Bhw.flatten(1)
        index = self.images(cells.shape[0]).to(cells.device)
        if self.home_BG is not None:
            home = self.home_BG.expand(cells.shape[0], -1).to(cells.device)
            cells = torch.zeros_like(cells).scatter_add(1, home, cells)
        shared = cells / self._tokens(cells.shape[0]).flatten(1).clamp(min=1).to(cells.device)
        values = shared.gather(1, index.clamp(min=0).flatten(1)).reshape(index.shape)
        return torch.where(index >= 0, values, 0)

    def counts(self, images: int) -> Tensor:
        """How many tokens lie in each cell, (B, h, w), or (1, h, w) where all images are alike; a fraction where the
        cell has part in one."""
        index = self.images(1 if self.index_BWN is None else images)
        return replace(self, index_BWN=index).sum_to_grid(torch.ones(index.shape))

    def to_grid(self, values_BWN: Tensor, *, shared: bool = False) -> Tensor:
        """As `sum_to_grid`, cells met more than once holding the mean.

        Args:
            shared: a token that others were merged into shares its value out among its cells, as its attention is;
                otherwise each of them holds it, as its features do.
        """
        summed_Bhw = self.sum_to_grid(values_BWN)
        if self.in_order:
            return summed_Bhw
        held_Bhw = self._tokens(summed_Bhw.shape[0]) if shared else self.counts(summed_Bhw.shape[0])
        return summed_Bhw / torch.where(held_Bhw > 0, held_Bhw, 1).to(summed_Bhw.device)

    def _tokens(self, images: int) -> Tensor:
        """How many tokens lie in each cell or in that of the token it was merged into."""
        counts_Bhw = self.counts(images)
        return (
            counts_Bhw if self.home_BG is None else counts_Bhw * self._sizes.gather(1, self.home_BG).view_as(counts_Bhw)
        )

    @cached_property
    def _sizes(self) -> Tensor:
        """How many cells have their token in each cell, (B, G); at least 1."""
        assert self.home_BG is not None
        ones = torch.ones(self.home_BG.shape)
        return torch.zeros_like(ones).scatter_add(1, self.home_BG, ones).clamp(min=1)

    def _places(self, index: Tensor) -> Tensor:
        """Cell of every token; those without a place go to one behind the grid, which is cut off."""
        return torch.where(index < 0, self.grid[0] * self.grid[1], index)


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

    @property
    def alike(self) -> tuple[object, ...]:
        """What the same call has in every image, wherever the tokens lie."""
        lie = [(tokens.grid, tokens.index_WN.shape) for tokens in (self.keys, self.queries) if tokens is not None]
        return self.name, self.kind, self.fused, self.axis, self.lead, self.windows, self.class_query, *lie

    def canonical(self, values: Tensor) -> Tensor:
        """Bring (B · lead[0], *lead[1:], Q, K) to (B, W, heads, Q, K)."""
        if values.ndim != len(self.lead) + 2 or values.shape[1 : len(self.lead)] != self.lead[1:]:
            raise LayoutError(f"{self.name} now has the shape {tuple(values.shape)}, and had (B · {self.lead}, …)")
        if len(self.lead) == 2 and self.lead[0] == 1 and not self.windows:
            return values[:, None]
        batch = values.shape[0] // self.lead[0]
        if values.shape[0] % self.lead[0]:
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


Axes: TypeAlias = "tuple[Tensor, Tensor]"
"""The y of a grid's rows and the x of its columns."""

Merge: TypeAlias = "tuple[Tensor, Tensor]"
"""Positions of tokens, and of those that they were merged into."""


def infer_axes(positions_: Tensor) -> Axes:
    """The rows and columns that occur among positions."""
    known = positions_[~positions_.isnan()]
    y, x = (part.sort().values for part in (known.real, known.imag))
    near = [torch.cat([values[:1], values[1:][values.diff() > _NEAR]]) for values in (y, x)]
    return near[0], near[1]


def infer_tokens(positions_WN: Tensor, whole: Sequence[Axes] = (), merges: Sequence[Merge] = ()) -> Tokens | None:
    """Infer the grid from the positions that occur; where tokens were dropped, it is the largest of the `whole` grids
    on which those that are left lie. Those that were merged, in that order, have a home."""
    known = ~positions_WN.isnan()
    if not known.any():
        return None
    fitting = [axes for axes in whole if _lie_on(positions_WN, axes)]
    y, x = max(fitting, key=lambda axes: len(axes[0]) * len(axes[1])) if fitting else infer_axes(positions_WN)
    if not fitting and len(y) * len(x) > 2 * int(known.sum()) + 2:
        return None
    index = torch.where(known, _cells(positions_WN, (y, x)), -1).cpu()
    return Tokens((len(y), len(x)), index, home_BG=_homes(index, (y, x), merges))


def _cells(positions_: Tensor, axes: Axes) -> Tensor:
    return _nearest(positions_.real, axes[0]) * len(axes[1]) + _nearest(positions_.imag, axes[1])


def _homes(index_WN: Tensor, axes: Axes, merges: Sequence[Merge]) -> Tensor | None:
    cells = torch.arange(len(axes[0]) * len(axes[1]))
    home = cells
    for moved, into in merges:
        step = cells.clone()
        step[_cells(moved, axes).cpu()] = _cells(into, axes).cpu()
        home = step[home]
    is_there = torch.isin(cells, index_WN)
    home = torch.where(~is_there & is_there[home], home, cells)  # merges elsewhere in the model move nothing here
    return None if torch.equal(home, cells) else home[None]


def _nearest(values: Tensor, starts: Tensor) -> Tensor:
    """Which row or column a value belongs to: the last that does not begin behind it."""
    return torch.searchsorted(starts, values.nan_to_num(0).contiguous() + _NEAR / 2).clamp(min=1) - 1


def _lie_on(positions_: Tensor, axes: Axes) -> bool:
    known = positions_[~positions_.isnan()]
    parts = zip((known.real, known.imag), axes, strict=True)
    return all(bool(((values - starts[_nearest(values, starts)]).abs() < 2 * _NEAR).all()) for values, starts in parts)


def infer_layout(
    positions_: Tensor, whole: Sequence[Axes] = (), merges: Sequence[Merge] = ()
) -> tuple[Tokens, int] | None:
    """Read a (1, C, h, w) or (1, h, w, C) map, or (1, N, C) tokens: where they lie, and which axis is C."""
    if positions_.ndim not in (3, 4) or len(positions_) != 1:
        return None
    for axis in (1, positions_.ndim - 1):
        if varies(positions_, axis):
            continue
        cells = positions_.select(axis, 0).reshape(1, -1)
        if not varies(cells, -1):
            return None
        tokens = infer_tokens(cells, whole, merges)
        return None if tokens is None else (tokens, axis)
    return None
