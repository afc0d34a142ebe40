"""Layouts: where tokens lie in the image, window by window, and the axes of a call of attention.

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
_NEAR = 2e-4  # tolerance of positions, as a fraction of the image; fine enough for some thousand rows or columns


@dataclass(frozen=True)
class Tokens:
    """The positions of the tokens of each window on the grid.

    Attributes:
        grid: (h, w).
        index_WN: (W, N) int64, the cell (row · w + column) of every token; −1 for class tokens, register tokens and
            padding.
        index_BWN: (B, W, N) int64, the cells for each image, if the model selects tokens depending on the image;
            `index_WN` then belongs to the first image. None if all images have the same positions.
        home_BG: (B, G) int64, for models that merge tokens. If the token of cell g was merged into another token, entry
            g is the cell of that other token; otherwise it is g. None if no tokens were merged.
    """

    grid: tuple[int, int]
    index_WN: Tensor  # noqa: N815
    index_BWN: Tensor | None = None  # noqa: N815
    home_BG: Tensor | None = None  # noqa: N815

    @cached_property
    def num_prefix_tokens(self) -> int:
        """The number of tokens before the first token on the grid."""
        placed = (self.index_WN >= 0).any(0)
        first = int(placed.int().argmax()) if placed.any() else len(placed)
        # tokens without a position: before the grid a prefix; after the grid a token fused from dropped tokens (EViT);
        # inside the grid padding
        beyond = len(placed) - int(placed.flip(0).int().argmax())
        return first if placed[first:beyond].all() else 0

    @property
    def windowed(self) -> bool:
        """Whether there is more than one window."""
        return len(self.index_WN) > 1

    @cached_property
    def in_order(self) -> bool:
        """Whether the prefix tokens come first and then the grid, row by row, as in a ViT."""
        cells = torch.arange(self.grid[0] * self.grid[1])
        alike = not self.windowed and self.index_BWN is None
        return alike and torch.equal(self.index_WN[0, self.num_prefix_tokens :], cells)

    def of_image(self, number: int) -> "Tokens":
        """Return the tokens of one image."""
        if self.index_BWN is None:
            return self
        home = None if self.home_BG is None else self.home_BG[number : number + 1]
        return Tokens(self.grid, self.index_BWN[number], home_BG=home)

    def some(self, tokens_N: Tensor) -> "Tokens":
        """Return a selection of the tokens, by a mask (N,) bool."""
        each = None if self.index_BWN is None else self.index_BWN[:, :, tokens_N]
        return Tokens(self.grid, self.index_WN[:, tokens_N], each, self.home_BG)

    def images(self, count: int) -> Tensor:
        """Return the cell of every token for `count` images, (B, W, N); −1 as in `index_WN`."""
        index = self.index_WN[None] if self.index_BWN is None else self.index_BWN
        return index.expand(count, *self.index_WN.shape)

    def of_cell(self, cell: int, count: int) -> Tensor:
        """Return a mask of the tokens that represent a cell, (B, W, N), for `count` images.

        These are the tokens in the cell, or the token that they were merged into.
        """
        if self.home_BG is None:
            return self.images(count) == cell
        return self.images(count) == self.home_BG[:, cell, None, None]

    def sum_to_grid(self, values_BWN: Tensor) -> Tensor:
        """Sum the values of the tokens, (B, W, N), in the cells of the grid: (B, h, w). Cells without tokens are 0.

        The value of a merged token is divided evenly among the cells of all tokens that it was merged from.
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
        """Return the sum of each token's cells, (B, W, N): the reverse of `sum_to_grid`.

        The value of a cell is divided evenly among its tokens. A token without a position has the value 0.
        """
        cells = cells_Bhw.flatten(1)
        index = self.images(cells.shape[0]).to(cells.device)
        if self.home_BG is not None:
            home = self.home_BG.expand(cells.shape[0], -1).to(cells.device)
            cells = torch.zeros_like(cells).scatter_add(1, home, cells)
        shared = cells / self._tokens(cells.shape[0]).flatten(1).clamp(min=1).to(cells.device)
        values = shared.gather(1, index.clamp(min=0).flatten(1)).reshape(index.shape)
        return torch.where(index >= 0, values, 0)

    def counts(self, images: int) -> Tensor:
        """Return the number of tokens in each cell, (B, h, w), or (1, h, w) if all images have the same positions.

        The number is a fraction for cells that share a token.
        """
        index = self.images(1 if self.index_BWN is None else images)
        return replace(self, index_BWN=index).sum_to_grid(torch.ones(index.shape))

    def to_grid(self, values_BWN: Tensor, *, shared: bool = False) -> Tensor:
        """Average the values of the tokens, (B, W, N), in the cells of the grid: (B, h, w). Cells without tokens are 0.

        Args:
            values_BWN: one value for each token.
            shared: how to treat a merged token. If true, the token's value is divided among the token's cells (for
                attention); otherwise each cell gets the whole value (for features).
        """
        summed_Bhw = self.sum_to_grid(values_BWN)
        if self.in_order:
            return summed_Bhw
        held_Bhw = self._tokens(summed_Bhw.shape[0]) if shared else self.counts(summed_Bhw.shape[0])
        return summed_Bhw / torch.where(held_Bhw > 0, held_Bhw, 1).to(summed_Bhw.device)

    def _tokens(self, images: int) -> Tensor:
        """Return the number of tokens that represent each cell; a merged token counts once in each of its cells."""
        counts_Bhw = self.counts(images)
        return (
            counts_Bhw if self.home_BG is None else counts_Bhw * self._sizes.gather(1, self.home_BG).view_as(counts_Bhw)
        )

    @cached_property
    def _sizes(self) -> Tensor:
        """For each cell, the number of cells that its token represents, including the cell itself, (B, G), ≥ 1."""
        assert self.home_BG is not None
        ones = torch.ones(self.home_BG.shape)
        return torch.zeros_like(ones).scatter_add(1, self.home_BG, ones).clamp(min=1)

    def _places(self, index: Tensor) -> Tensor:
        """Return the cell of every token; tokens without a position get an extra cell after the grid."""
        return torch.where(index < 0, self.grid[0] * self.grid[1], index)


@dataclass(frozen=True)
class Site:
    """One call of attention in the model.

    Attributes:
        name: dotted name of the module that attends.
        kind: `"self"` if the queries have positions in the image; `"cross"` if all are class tokens or learned queries.
        heads: number of heads.
        queries: positions of the queries; None for queries without positions (class tokens, learned queries).
        keys: positions of the keys.
        fused: whether the call is scaled_dot_product_attention; otherwise it is a softmax.
        lead: sizes of the axes before the axes of queries and keys, for a batch of one image.
        windows: indices of the axes in `lead` that run over windows.
        axis: the axis of the softmax; None if the call is fused.
        context: whether the softmax runs over one score for each position, without queries.
        class_query: index of the query whose row is shown for the whole image. 0 if the first query is a class token,
            or if no query has a position; otherwise None.
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
        """The grid of the keys, (h, w)."""
        return self.keys.grid

    @property
    def windowed(self) -> bool:
        """Whether the keys are divided into windows."""
        return self.keys.windowed

    @property
    def num_prefix_tokens(self) -> int:
        """The number of class and register tokens before the grid of the keys."""
        return self.keys.num_prefix_tokens

    @property
    def reads_the_grid(self) -> bool:
        """Whether the query at `class_query` attends to the whole grid."""
        return self.class_query is not None and not self.windowed and not self.context

    @property
    def alike(self) -> tuple[object, ...]:
        """The properties of the call that do not depend on the positions of the tokens."""
        shapes = [(tokens.grid, tokens.index_WN.shape) for tokens in (self.keys, self.queries) if tokens is not None]
        return self.name, self.kind, self.fused, self.axis, self.lead, self.windows, self.class_query, *shapes

    def canonical(self, values: Tensor) -> Tensor:
        """Reshape (B · lead[0], *lead[1:], Q, K) to (B, W, heads, Q, K).

        Raises:
            LayoutError: the shape of the values differs from the survey.
        """
        if values.ndim != len(self.lead) + 2 or values.shape[1 : len(self.lead)] != self.lead[1:]:
            raise LayoutError(
                f"{self.name} has the shape {tuple(values.shape)}, but it had (B · {self.lead}, …) in the survey"
            )
        if len(self.lead) == 2 and self.lead[0] == 1 and not self.windows:
            return values[:, None]
        batch = values.shape[0] // self.lead[0]
        if values.shape[0] % self.lead[0]:
            raise LayoutError(f"the first axis of {self.name}, {values.shape[0]}, is not a multiple of {self.lead[0]}")
        values = values.unflatten(0, (batch, self.lead[0]))
        windows = [axis + 1 for axis in self.windows]
        heads = [axis + 1 for axis in range(len(self.lead)) if axis not in self.windows]
        if windows + heads != list(range(1, len(self.lead) + 1)):
            values = values.permute(0, *windows, *heads, values.ndim - 2, values.ndim - 1)
        count = math.prod(self.lead[axis] for axis in self.windows)
        return values.reshape(batch, count, math.prod(self.lead) // count, *values.shape[-2:])


class LayoutError(RuntimeError):
    """The shape of a call of attention differs from the survey."""


@dataclass(frozen=True)
class Activation:
    """An output that lies on a grid: a feature map, or tokens.

    Attributes:
        name: dotted name of the module that returns it.
        tokens: positions of the output's elements, with W = 1.
        channel_axis: axis of the channels in the output.
        time: number of modules that had returned, including the module itself; comparable with `Survey.times`.
    """

    name: str
    tokens: Tokens
    channel_axis: int
    time: int


def varies(positions_: Tensor | None, axis: int) -> bool:
    """Return whether positions differ along an axis."""
    if positions_ is None or positions_.stride(axis) == 0 or positions_.shape[axis] == 1:
        return False
    for other in range(positions_.ndim):  # all elements of an expanded axis are equal
        if positions_.stride(other) == 0:
            positions_ = positions_.narrow(other, 0, 1)
    parts = torch.view_as_real(positions_)
    low, high = (parts.nan_to_num(bad).aminmax(dim=axis % positions_.ndim) for bad in (9.0, -9.0))
    return bool((high.max - low.min > _NEAR).any())


def per_window(positions_: Tensor, windows: tuple[int, ...], lead: int) -> Tensor:
    """Reshape positions (*lead, N) to (W, N). Along axes that do not run over windows all elements are equal."""
    for axis in reversed(range(lead)):
        if axis not in windows:
            positions_ = positions_.select(axis, 0)
    return positions_.reshape(-1, positions_.shape[-1])


Axes: TypeAlias = "tuple[Tensor, Tensor]"
"""The y coordinates of a grid's rows, and the x coordinates of its columns."""

Merge: TypeAlias = "tuple[Tensor, Tensor]"
"""Positions of merged tokens, and positions of the tokens that they were merged into."""


def infer_axes(positions_: Tensor) -> Axes:
    """Return the rows (y) and columns (x) that occur among positions."""
    known = positions_[~positions_.isnan()]
    y, x = (part.sort().values for part in (known.real, known.imag))
    near = [torch.cat([values[:1], values[1:][values.diff() > _NEAR]]) for values in (y, x)]
    return near[0], near[1]


def infer_tokens(positions_WN: Tensor, whole: Sequence[Axes] = (), merges: Sequence[Merge] = ()) -> Tokens | None:
    """Infer tokens on a grid from their positions; None if the positions form no grid.

    Args:
        positions_WN: positions y + ix; NaN for tokens without a position.
        whole: grids that the tokens had before some tokens were dropped. The result uses the largest of these grids
            that contains all positions.
        merges: merged tokens, in order; see `Tokens.home_BG`.
    """
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
    home = torch.where(~is_there & is_there[home], home, cells)  # only merges of removed tokens into remaining tokens
    return None if torch.equal(home, cells) else home[None]


def _nearest(values: Tensor, starts: Tensor) -> Tensor:
    """Return the index of the row or column of each value: the last entry of `starts` that is at most the value."""
    return torch.searchsorted(starts, values.nan_to_num(0).contiguous() + _NEAR / 2).clamp(min=1) - 1


def _lie_on(positions_: Tensor, axes: Axes) -> bool:
    known = positions_[~positions_.isnan()]
    parts = zip((known.real, known.imag), axes, strict=True)
    return all(bool(((values - starts[_nearest(values, starts)]).abs() < 2 * _NEAR).all()) for values, starts in parts)


def infer_layout(
    positions_: Tensor, whole: Sequence[Axes] = (), merges: Sequence[Merge] = ()
) -> tuple[Tokens, int] | None:
    """Return the tokens and the channel axis, from positions of shape (1, C, h, w), (1, h, w, C) or (1, N, C).

    Return None if the positions form no grid.
    """
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
