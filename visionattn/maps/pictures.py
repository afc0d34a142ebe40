"""Records and heatmaps as pictures, for notebooks.

Shapes: B images, W windows, H heads, Q queries, K keys, C channels, R looks at once, T glimpses, S scales, h × w grid.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.data.decode import encode_image
from visionattn.overlay.draw import Tile, heat, sheet
from visionattn.overlay.gaze import draw_gaze

if TYPE_CHECKING:
    from visionattn.maps.records import Record

_IMAGES, _HEADS, _LAYERS = 4, 16, 24  # at most; more would be too small to be seen
_GREY = 70
_KINDS = {"self": "self-attention", "cross": "cross-attention", "glimpse": "glimpses"}


def of_record(record: "Record") -> NDArray[np.uint8] | None:
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
        Tile(_heat(maps_BHhw[b, head]), [f"head {head}", *_numbered(b)] if heads > 1 else _numbered(b))
        for b in range(len(maps_BHhw))
        for head in range(heads)
    ]
    columns = heads if 1 < heads <= 8 else 8
    return sheet(tiles, title=title, columns=columns, width=120 if len(tiles) > 4 else 240)


def of_records(records: "Sequence[Record]") -> NDArray[np.uint8] | None:
    """What each call showed of the first image, heads and channels averaged; None where no weights were kept."""
    tiles = []
    for record in records:
        if record.weights is not None and record.grid != (1, 1) and record.kind != "channel_gate":
            tiles.append(Tile(_heat(_maps(record)[0].mean(0)), [record.name]))
    return sheet(tiles[:_LAYERS], columns=6, width=140) if tiles else None


def of_heatmaps(heatmaps_Bhw: Tensor, title: str) -> NDArray[np.uint8]:
    """Heatmaps of a batch."""
    shown = heatmaps_Bhw[: 4 * _IMAGES]
    return sheet([Tile(_heat(one), _numbered(b)) for b, one in enumerate(shown)], title=title, columns=4, width=180)


def png(picture: NDArray[np.uint8] | None) -> bytes | None:
    """What a notebook takes; None lets it show the text."""
    return None if picture is None else encode_image(picture, ".png")


def _maps(record: "Record") -> Tensor:
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


def _asked(record: "Record", weights: Tensor) -> Tensor:
    """The class token's row of weights (B, W, …, Q, K); without one, the mean over patches."""
    if record.queries is None:
        return weights[..., 0, :]
    first = record.queries.num_prefix_tokens
    return weights[..., 0, :] if first else weights.mean(-2)


def _heat(map_hw: Tensor) -> NDArray[np.uint8]:
    values = map_hw.float().cpu().numpy()
    low, high = float(values.min()), float(values.max())
    return heat((values - low) / (high - low) if high > low else np.zeros_like(values))


def _bars(weights_C: NDArray[np.floating]) -> NDArray[np.uint8]:
    """One bar a channel, in their order, the highest as high as the picture."""
    height, wide = 60, max(1, 400 // len(weights_C))
    share = np.repeat(np.clip(weights_C / max(float(weights_C.max()), 1e-12), 0, 1), wide)
    filled_HW = np.arange(height)[::-1, None] < share * height
    return heat(np.where(filled_HW, 0.7, 0.0))


def _numbered(number: int) -> list[str]:
    return [f"image {number}"]
