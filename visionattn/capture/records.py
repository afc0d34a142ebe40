"""Records: the captured weights of each call of attention, and their pictures.

Shapes: B images, W windows, H heads, Q queries, K keys, C channels, R glimpses in parallel, T glimpses one after
another, S scales, h × w grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.capture.results import compact_state, to_plain
from visionattn.capture.token_layout import Tokens
from visionattn.data import encode_image
from visionattn.drawing import Tile, draw_scanpath, heat, heat_of_range, sheet
from visionattn.errors import UsageError, nearest

_IMAGES, _HEADS, _LAYERS = 4, 16, 24  # largest numbers in one picture; more tiles would be too small to read
_GREY = 70
_KINDS = {"self": "self-attention", "cross": "cross-attention", "glimpse": "glimpses"}

Kind = Literal["self", "cross", "channel_gate", "spatial_gate", "glimpse", "activation"]


@dataclass(frozen=True, repr=False)
class Record:
    """One call of attention or of a gate, or all glimpses of a retina in one call of the model.

    `print` adds the range of the weights to the description, and a notebook draws the record.

    Attributes:
        name: dotted name of the module that attends.
        kind: kind of attention.
        grid: (h, w) of the keys, or of the gate; for glimpses the rows and columns of the images.
        num_prefix_tokens: number of class and register tokens before the grid.
        heads: number of heads; 1 for gates.
        queries, keys: positions of the tokens on the grid, window by window; None for gates, and for tokens that have
            no position.
        weights: float32. The `Reduction` determines the shape; gates have (B, C, 1, 1), (B, 1, h, w) or (B, C, h, w).
            None if no weights were kept.
        call: number of earlier calls of the model inside the same capture.
        locations: (B, R, T, 2), the locations of glimpses in order, (x, y) in [−1, 1]; None for other kinds.
        boxes: (B, R, T, S, 4), the boxes that the glimpses covered at each scale, xyxy in pixels of the model's input;
            None for other kinds.
    """

    name: str
    kind: Kind
    grid: tuple[int, int]
    num_prefix_tokens: int
    heads: int
    queries: Tokens | None
    keys: Tokens | None
    weights: Tensor | None
    call: int
    locations: Tensor | None = None
    boxes: Tensor | None = None

    @property
    def windowed(self) -> bool:
        """Whether the keys are divided into windows."""
        return self.keys is not None and self.keys.windowed

    def maps(self) -> Tensor:
        """Return the maps on the grid that a notebook draws, (B, H, h, w).

        `ClassRow` and `PatchRow` give the kept row of each head, `FullAttention` the class token's row of each head (or
        the mean over all rows, without prefix tokens), and `HeadMean` the same averaged over heads (H = 1). Class and
        register tokens have no place on the grid and are left out. A gate gives its mean over channels (H = 1).

        Raises:
            UsageError: no weights were kept.
        """
        if self.weights is None:
            raise UsageError(f"no weights of {self.name} were kept; name the module in capture(…, layers=[…])")
        return _maps(self)

    def to_dict(self) -> dict[str, object]:
        """Return the record as plain data for `json.dumps`. Arrays are nested lists.

        `query_cells` and `key_cells` hold the cell (row · w + column) of each token, window by window, and −1 for
        tokens without a position.
        """
        return {
            "name": self.name,
            "kind": self.kind,
            "grid": list(self.grid),
            "num_prefix_tokens": self.num_prefix_tokens,
            "heads": self.heads,
            "call": self.call,
            "query_cells": None if self.queries is None else self.queries.index_WN.tolist(),
            "key_cells": None if self.keys is None else self.keys.index_WN.tolist(),
            "weights": to_plain(self.weights),
            "locations": to_plain(self.locations),
            "boxes": to_plain(self.boxes),
        }

    def __str__(self) -> str:
        """Return the description, followed by the range of the weights or by the locations of the first image."""
        if self.locations is not None:
            shown = "; ".join(f"({x:.2f}, {y:.2f})" for x, y in self.locations.flatten(1, 2)[:1].flatten(0, 1).tolist())
            return f"{self!r}\n  locations in the first image: {shown}"
        if self.weights is None or not self.weights.numel():
            return repr(self)
        low, high, mean = (float(value) for value in (self.weights.min(), self.weights.max(), self.weights.mean()))
        return f"{self!r}\n  weights {low:.3g} to {high:.3g}, mean {mean:.3g}"

    def __getstate__(self) -> dict[str, object]:
        return compact_state(self)

    def __repr__(self) -> str:
        kept = "nothing kept" if self.weights is None else f"weights {tuple(self.weights.shape)}"
        if self.boxes is not None:
            kept = f"boxes {tuple(self.boxes.shape)}"
        return f"Record({self.name}: {self.kind}, grid {self.grid[0]}×{self.grid[1]}, {self.heads} heads, {kept})"

    def _repr_png_(self) -> bytes | None:
        """Show the record as a picture in a notebook."""
        return _png(of_record(self))


class Records(Sequence[Record]):
    """The records of a capture in order, and the modules whose attention could not be recorded.

    `records[i]` is the record with index i, and `records["blocks.2.attn"]` is the last record of that module. `print`
    shows the report, and a notebook draws the maps of the first image.

    Attributes:
        unlabelled: module → the reason why its attention was not understood.
        other: module → the reason why its softmax is not attention over positions.
        missed: modules whose class name suggests attention, but in which no attention was found.
        calls: number of calls of the model.
    """

    def __init__(self) -> None:
        self._records: list[Record] = []
        self.unlabelled: dict[str, str] = {}
        self.other: dict[str, str] = {}
        self.missed: list[str] = []
        self.calls = 0

    @overload
    def __getitem__(self, index: int | str) -> Record: ...

    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...

    def __getitem__(self, index: int | str | slice) -> Record | list[Record]:
        if isinstance(index, str):
            matching = [record for record in self._records if record.name == index]
            if not matching:
                names = sorted({record.name for record in self._records})
                raise UsageError(f"nothing attends in {index!r}.{nearest(index, names)}")
            return matching[-1]
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    @property
    def attention(self) -> list[Record]:
        """The records of attention over positions, without gates and glimpses."""
        return [record for record in self._records if record.kind in ("self", "cross")]

    @property
    def gates(self) -> list[Record]:
        """The records of gates over channels and over positions."""
        return [record for record in self._records if record.kind in ("channel_gate", "spatial_gate")]

    @property
    def glimpses(self) -> list[Record]:
        """The records of retinas."""
        return [record for record in self._records if record.kind == "glimpse"]

    def to_dict(self) -> dict[str, object]:
        """Return the records as plain data for `json.dumps`."""
        return {
            "calls": self.calls,
            "records": [record.to_dict() for record in self._records],
            "unlabelled": dict(self.unlabelled),
            "other": dict(self.other),
            "missed": list(self.missed),
        }

    def kept(self) -> tuple[Record, Tokens, Tensor]:
        """Return the last record of attention with weights, the positions of its keys, and the weights.

        Raises:
            UsageError: no weights were kept.
        """
        for record in reversed(self.attention):
            if record.weights is not None and record.keys is not None:
                return record, record.keys, record.weights
        raise UsageError("no weights were kept; check the names of `layers`, and that the patch lies on the grid")

    def report(self) -> str:
        """Return a line per record, and the modules that were not understood or unexpectedly did not attend."""
        count = f"{len(self)} record{'' if len(self) == 1 else 's'}"
        lines = [f"{count} of {self.calls} call{'' if self.calls == 1 else 's'} of the model"]
        for record in self._records:
            shape = "×".join(map(str, record.grid))
            windows = f", {len(record.keys.index_WN)} windows" if record.keys is not None and record.windowed else ""
            details = f"grid {shape}, {record.heads} heads{windows}"
            if record.boxes is not None:
                details = f"{record.boxes.shape[2]} at {record.boxes.shape[3]} scales in {shape} pixels"
            lines.append(f"  {record.name}: {record.kind}, {details}")
        for title, reasons in (("not understood", self.unlabelled), ("not over positions", self.other)):
            if reasons:
                lines += [f"{len(reasons)} {title}", *(f"  {name}: {why}" for name, why in reasons.items())]
        if self.missed:
            lines += [f"{len(self.missed)} look like attention but did not attend", *map("  {}".format, self.missed)]
        return "\n".join(lines)

    __repr__ = report

    def _repr_png_(self) -> bytes | None:
        """Show the attention of each record in the first image in a notebook."""
        return _png(of_records(self))


def of_record(record: Record) -> NDArray[np.uint8] | None:
    """Draw a record as (H, W, 3) uint8 RGB; None if no weights were kept.

    For attention, the picture has a map for each head and image: the class token's row, or without a class token the
    mean over the patches' rows. A gate over positions is drawn as a map, a gate over channels as bars, and glimpses as
    a path. Each map has its own range of colours, from its smallest value to its largest.
    """
    title = f"{_KINDS.get(record.kind, record.kind.replace('_', ' '))} of {record.name}"
    if record.boxes is not None:
        canvas = np.full((*record.grid, 3), _GREY, np.uint8)
        paths = record.boxes[:_IMAGES, 0].cpu().numpy()
        return sheet([Tile(draw_scanpath(canvas, path), _numbered(b)) for b, path in enumerate(paths)], title=title)
    if record.weights is None:
        return None
    if record.kind == "channel_gate":
        weights_BC = record.weights[:_IMAGES, :, 0, 0].cpu().numpy()
        tiles = [Tile(_bars(weights_C), _numbered(b)) for b, weights_C in enumerate(weights_BC)]
        return sheet(tiles, title=f"0 to {weights_BC.max():.2g}: {title}", columns=1, width=400)
    maps_BHhw = _maps(record)[:_IMAGES, :_HEADS]
    if record.keys is None:
        title = f"{float(maps_BHhw.min()):.2g} to {float(maps_BHhw.max()):.2g}: {title}"
    heads = maps_BHhw.shape[1]
    tiles = [
        Tile(_heat_of_map(maps_BHhw[b, head]), [f"head {head}", *_numbered(b)] if heads > 1 else _numbered(b))
        for b in range(len(maps_BHhw))
        for head in range(heads)
    ]
    columns = heads if 1 < heads <= 8 else 8
    return sheet(tiles, title=title, columns=columns, width=120 if len(tiles) > 4 else 240)


def of_records(records: Sequence[Record]) -> NDArray[np.uint8] | None:
    """Draw the map of each record in the first image, averaged over heads and channels; None if there is no map."""
    tiles = []
    for record in records:
        if record.weights is not None and record.grid != (1, 1) and record.kind != "channel_gate":
            tiles.append(Tile(_heat_of_map(_maps(record)[0].mean(0)), [record.name]))
    return sheet(tiles[:_LAYERS], columns=6, width=140) if tiles else None


def _png(picture: NDArray[np.uint8] | None) -> bytes | None:
    """Encode a picture for a notebook; return None without a picture, so that the notebook shows the text."""
    return None if picture is None else encode_image(picture, ".png")


def _maps(record: Record) -> Tensor:
    """Return the maps of a record, (B, H, h, w); H is 1 if heads or channels were averaged."""
    weights = record.weights
    assert weights is not None
    if record.keys is None:
        return weights.mean(1, keepdim=True)  # a gate, (B, C, h, w)
    if weights.ndim == 5 or (weights.ndim == 4 and weights.shape[2] != record.heads):
        weights = _query_row(record, weights)  # the weights of all queries, for each head or averaged over heads
    if weights.ndim == 3:
        weights = weights[:, :, None]
    keys = record.keys
    return torch.stack([keys.to_grid(weights[:, :, head], shared=True) for head in range(weights.shape[2])], 1)


def _query_row(record: Record, weights: Tensor) -> Tensor:
    """Return the class token's row of weights (B, W, …, Q, K); without prefix tokens, the mean over all rows."""
    if record.queries is None:
        return weights[..., 0, :]
    first = record.queries.num_prefix_tokens
    return weights[..., 0, :] if first else weights.mean(-2)


def _bars(weights_C: NDArray[np.floating]) -> NDArray[np.uint8]:
    """Draw one bar per channel, in order; the longest bar has the height of the picture."""
    height, wide = 60, max(1, 400 // len(weights_C))
    share = np.repeat(np.clip(weights_C / max(float(weights_C.max()), 1e-12), 0, 1), wide)
    filled_HW = np.arange(height)[::-1, None] < share * height
    return heat(np.where(filled_HW, 0.7, 0.0))


def _numbered(number: int) -> list[str]:
    return [f"image {number}"]


def _heat_of_map(map_hw: Tensor) -> NDArray[np.uint8]:
    return heat_of_range(map_hw.float().cpu().numpy())


def on_grid(calls: Sequence[Record]) -> Tensor:
    """Return one map, (B, h, w), for all calls of a spatial gate: the weights of the last call, averaged over channels.

    Calls of different shapes are gates over rows and gates over columns. In this case the map is the product of the
    last two calls' weights, averaged over channels.
    """
    weights = [record.weights for record in calls if record.weights is not None]
    if len({w.shape[1:] for w in weights}) > 1:  # rows and columns
        return (weights[-2] * weights[-1]).mean(1)
    return weights[-1].mean(1)
