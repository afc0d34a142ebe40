"""Records: what was captured of each call of attention, and how a notebook shows them.

Shapes: B images, W windows, H heads, Q queries, K keys, C channels, R looks at once, T glimpses, S scales, h × w grid.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.capture.token_layout import Tokens
from visionattn.data.decode import encode_image
from visionattn.drawing.overlay import heat
from visionattn.drawing.scanpath import draw_gaze
from visionattn.drawing.sheets import Tile, heat_of_range, sheet
from visionattn.errors import UsageError, nearest

_IMAGES, _HEADS, _LAYERS = 4, 16, 24  # at most; more would be too small to be seen
_GREY = 70
_KINDS = {"self": "self-attention", "cross": "cross-attention", "glimpse": "glimpses"}

Kind = Literal["self", "cross", "channel_gate", "spatial_gate", "glimpse", "activation"]


@dataclass(frozen=True, repr=False)
class Record:
    """One call of attention; of glimpses, all that a retina looked at in a call of the model.

    Attributes:
        name: dotted name of the module that attends.
        kind: what attends to what.
        grid: (h, w) of the keys, or of the gate; of glimpses, the images' rows and columns.
        num_prefix_tokens: class and register tokens before the grid.
        heads: number of heads; 1 for gates.
        queries, keys: where tokens lie on the grid, window by window; None where they have no place, and for gates.
        weights: what was kept, float32; None where nothing was. See `keep.py`; gates: (B, C, 1, 1), (B, 1, h, w) or
            (B, C, h, w).
        call: how many calls of the model lay before, inside the same capture.
        locations: of glimpses, (B, R, T, 2), where it looked, in order: (x, y) in [−1, 1].
        boxes: of glimpses, (B, R, T, S, 4), what each scale covered: xyxy in pixels of the model's input.
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
        return self.keys is not None and self.keys.windowed

    def __repr__(self) -> str:
        kept = "nothing kept" if self.weights is None else f"weights {tuple(self.weights.shape)}"
        if self.boxes is not None:
            kept = f"boxes {tuple(self.boxes.shape)}"
        return f"Record({self.name}: {self.kind}, grid {self.grid[0]}×{self.grid[1]}, {self.heads} heads, {kept})"

    def _repr_png_(self) -> bytes | None:
        """A notebook shows the record as a picture."""
        return _png(of_record(self))


class Records(Sequence[Record]):
    """What was seen, in order; also which sites were not understood."""

    def __init__(self) -> None:
        self._records: list[Record] = []
        self.unlabelled: dict[str, str] = {}
        self.other: dict[str, str] = {}
        self.missed: list[str] = []
        self.calls = 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, str):
            found = [record for record in self._records if record.name == index]
            if not found:
                names = sorted({record.name for record in self._records})
                raise UsageError(f"nothing attends in {index!r}.{nearest(index, names)}")
            return found[-1]
        return self._records[index]

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[Record]:
        return iter(self._records)

    @property
    def attention(self) -> list[Record]:
        """Records of attention over positions, without gates."""
        return [record for record in self._records if record.kind in ("self", "cross")]

    @property
    def gates(self) -> list[Record]:
        return [record for record in self._records if record.kind in ("channel_gate", "spatial_gate")]

    @property
    def glimpses(self) -> list[Record]:
        return [record for record in self._records if record.kind == "glimpse"]

    def kept(self) -> tuple[Record, Tokens, Tensor]:
        """The last call of attention whose weights were kept, where its keys lie, and the weights.

        Raises:
            UsageError: of none.
        """
        for record in reversed(self.attention):
            if record.weights is not None and record.keys is not None:
                return record, record.keys, record.weights
        raise UsageError("no weights were kept; is there such a layer, and such a patch?")

    def report(self) -> str:
        """Say what was seen, what was not understood, and what looks like attention and was never heard of."""
        lines = [f"{len(self)} seen in {self.calls} {'call' if self.calls == 1 else 'calls'} of the model"]
        for record in self._records:
            shape = "×".join(map(str, record.grid))
            windows = f", {len(record.keys.index_WN)} windows" if record.keys is not None and record.windowed else ""
            many = f"grid {shape}, {record.heads} heads{windows}"
            if record.boxes is not None:
                many = f"{record.boxes.shape[2]} at {record.boxes.shape[3]} scales in {shape} pixels"
            lines.append(f"  {record.name}: {record.kind}, {many}")
        for title, found in (("not understood", self.unlabelled), ("not over positions", self.other)):
            if found:
                lines += [f"{len(found)} {title}", *(f"  {name}: {why}" for name, why in found.items())]
        if self.missed:
            lines += [
                f"{len(self.missed)} look like attention and were not seen to attend",
                *map("  {}".format, self.missed),
            ]
        return "\n".join(lines)

    __repr__ = report

    def _repr_png_(self) -> bytes | None:
        """A notebook shows what each attended to in the first image."""
        return _png(of_records(self))


def of_record(record: Record) -> NDArray[np.uint8] | None:
    """One call of attention: of every head and image what the class token attends to, or its patches on average; a gate
    over positions; bars of a gate over channels; the path of glimpses. None where no weights were kept.

    Each map spans the colours by itself, from its smallest value to its largest.
    """
    title = f"{_KINDS.get(record.kind, record.kind.replace('_', ' '))} of {record.name}"
    if record.boxes is not None:
        canvas = np.full((*record.grid, 3), _GREY, np.uint8)
        paths = record.boxes[:_IMAGES, 0].cpu().numpy()
        return sheet([Tile(draw_gaze(canvas, path), _numbered(b)) for b, path in enumerate(paths)], title=title)
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
    """What each call showed of the first image, heads and channels averaged; None where no weights were kept."""
    tiles = []
    for record in records:
        if record.weights is not None and record.grid != (1, 1) and record.kind != "channel_gate":
            tiles.append(Tile(_heat_of_map(_maps(record)[0].mean(0)), [record.name]))
    return sheet(tiles[:_LAYERS], columns=6, width=140) if tiles else None


def _png(picture: NDArray[np.uint8] | None) -> bytes | None:
    """What a notebook takes; None lets it show the text."""
    return None if picture is None else encode_image(picture, ".png")


def _maps(record: Record) -> Tensor:
    """(B, H, h, w); H is 1 where heads or channels were averaged."""
    weights = record.weights
    assert weights is not None
    if record.keys is None:
        return weights.mean(1, keepdim=True)  # a gate, (B, C, h, w)
    if weights.ndim == 5 or (weights.ndim == 4 and weights.shape[2] != record.heads):
        weights = _asked(record, weights)  # every query, of every head or of their mean
    if weights.ndim == 3:
        weights = weights[:, :, None]
    keys = record.keys
    return torch.stack([keys.to_grid(weights[:, :, head], shared=True) for head in range(weights.shape[2])], 1)


def _asked(record: Record, weights: Tensor) -> Tensor:
    """The class token's row of weights (B, W, …, Q, K); without one, the mean over patches."""
    if record.queries is None:
        return weights[..., 0, :]
    first = record.queries.num_prefix_tokens
    return weights[..., 0, :] if first else weights.mean(-2)


def _bars(weights_C: NDArray[np.floating]) -> NDArray[np.uint8]:
    """One bar a channel, in their order, the highest as high as the picture."""
    height, wide = 60, max(1, 400 // len(weights_C))
    share = np.repeat(np.clip(weights_C / max(float(weights_C.max()), 1e-12), 0, 1), wide)
    filled_HW = np.arange(height)[::-1, None] < share * height
    return heat(np.where(filled_HW, 0.7, 0.0))


def _numbered(number: int) -> list[str]:
    return [f"image {number}"]


def _heat_of_map(map_hw: Tensor) -> NDArray[np.uint8]:
    return heat_of_range(map_hw.float().cpu().numpy())


def on_grid(calls: Sequence[Record]) -> Tensor:
    """Show the calls of one spatial gate as one map, (B, h, w)."""
    weights = [record.weights for record in calls if record.weights is not None]
    if len({w.shape[1:] for w in weights}) > 1:  # rows and columns
        return (weights[-2] * weights[-1]).mean(1)
    return weights[-1].mean(1)
