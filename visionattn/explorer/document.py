"""A page put together: what it is told of each image, and the one file that holds all.

Shapes: T glimpses, S scales, K classes, N boxes, h × w grid.
"""

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visionattn.data.placement import Placement
from visionattn.drawing.overlay import COLORMAPS, heat
from visionattn.errors import UsageError
from visionattn.explorer.analysis import Attention, ChannelGate, Findings, Heatmap, SpatialGate, Weights, area
from visionattn.explorer.encoding import LEVELS, Pack

GENERATOR = "visionattn explore"

_TOLD = 5  # likeliest classes
_SCRIPTS = "data.js", "attention.js", "draw.js", "parts.js", "shown.js", "panels.js", "page.js"


@dataclass(frozen=True)
class Shown:
    """One image on its way to the page: `source` is its picture, at most `_SIDE` pixels a side, as a data URI of `size`
    (width, height)."""

    name: str
    source: str
    size: tuple[int, int]
    placement: Placement
    findings: Findings
    glimpses: Mapping[str, Any] | None = None
    detections: Mapping[str, Any] | None = None


def compose(shown: Sequence[Shown], levels: int, model_name: str, class_names: Sequence[str]) -> str:
    packs = [Pack() for _ in shown]
    pictures = [_facts(one, pack, levels) for one, pack in zip(shown, packs, strict=True)]
    told = {index for picture in pictures for index in _classes(picture)}
    facts = {
        "model": model_name,
        "classes": {index: class_names[index] for index in sorted(told) if index < len(class_names)},
        "colours": {name: _base64(_ramp(name)) for name in COLORMAPS},
        "pictures": pictures,
    }
    blobs = "\n".join(
        f'<script type="application/octet-stream" id="numbers-{number}">{pack.text}</script>'
        for number, pack in enumerate(packs)
    )
    style, script, template = (_shipped(name) for name in ("page.css", "", "index.html"))
    policy = f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'"
    parts = {
        "policy": policy,
        "generator": GENERATOR,
        "style": style,
        "script": script,
        "facts": json.dumps(facts, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        "numbers": blobs,
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _facts(one: Shown, pack: Pack, levels: int) -> dict[str, Any]:
    """What the page is told of an image; the numbers go into its pack."""
    placement, found = one.placement, one.findings
    height, width = placement.source_size
    facts: dict[str, Any] = {
        "name": one.name,
        "size": [width, height],
        "shown": one.size,
        "source": one.source,
        "matrix": [round(float(value), 6) for value in placement.matrix.ravel()],
        "input": [placement.input_size[1], placement.input_size[0]],
        "answer": _likeliest(found.scores),
        "attention": [_attention(layer, pack, levels) for layer in found.attention],
        "gates": [_gate(gate, pack) for gate in found.gates],
        "heatmaps": [_heatmap(heatmap, pack) for heatmap in found.heatmaps],
        "failed": dict(found.failed),
        "glimpses": None if one.glimpses is None else _glimpses(one.glimpses),
        "detections": None if one.detections is None else _detections(one.detections, pack),
    }
    return facts


def _attention(layer: Attention, pack: Pack, levels: int) -> dict[str, Any]:
    return {
        "name": layer.name,
        "heads": layer.heads,
        "grid": layer.grid,
        "queryGrid": layer.query_grid,
        "asks": layer.asks,
        "chains": layer.chains,
        "classAt": layer.class_at,
        "queries": None if layer.queries is None else pack.add(layer.queries),
        "keys": pack.add(layer.keys),
        "whole": _weights(layer.whole, pack, LEVELS[0]),
        "rows": None if layer.rows is None else _weights(layer.rows, pack, levels),
    }


def _weights(weights: Weights, pack: Pack, levels: int) -> list[dict[str, Any]]:
    parts = [weights.placed.add_to(pack, levels)]
    return parts if weights.rest is None else [*parts, weights.rest.add_to(pack, LEVELS[0])]


def _gate(gate: SpatialGate | ChannelGate, pack: Pack) -> dict[str, Any]:
    if isinstance(gate, SpatialGate):
        return {"name": gate.name, "kind": "spatial", "map": _scaled(gate.weights, pack)}
    features = None if gate.features is None else [_scaled(feature, pack) for feature in gate.features]
    return {
        "name": gate.name,
        "kind": "channel",
        "weights": pack.add(np.asarray(gate.weights, np.float32)),
        "channels": gate.channels.tolist(),
        "features": features,
    }


def _heatmap(heatmap: Heatmap, pack: Pack) -> dict[str, Any]:
    curves = {
        name: {"scores": [round(score, 6) for score in scores], "area": round(area(scores), 6)}
        for name, scores in (("deletion", heatmap.deletion), ("insertion", heatmap.insertion))
        if scores is not None
    }
    return {
        "name": heatmap.name,
        "source": heatmap.source,
        "control": heatmap.control,
        "map": _scaled(heatmap.values, pack),
        "curves": curves,
        "unbeaten": {figure: list(names) for figure, names in heatmap.unbeaten.items()},
    }


def _glimpses(given: Mapping[str, Any]) -> dict[str, Any]:
    locations_T2, boxes_TS4 = (np.asarray(given[name], float) for name in ("locations", "boxes"))
    probabilities_TK, patches = np.asarray(given["probabilities"], float), given["patches"]
    counts = {len(part) for part in (locations_T2, boxes_TS4, probabilities_TK, patches)}
    if len(counts) != 1 or locations_T2.shape[1:] != (2,) or boxes_TS4.ndim != 3 or boxes_TS4.shape[2] != 4:
        raise UsageError(
            "glimpses are locations (T, 2), boxes (T, S, 4), patches (T, S, h, w, 3) and probabilities (T, K), got "
            f"{locations_T2.shape}, {boxes_TS4.shape}, {len(patches)} and {probabilities_TK.shape}"
        )
    best = np.argsort(-probabilities_TK[-1], kind="stable")[:_TOLD].tolist()
    classes = list(dict.fromkeys([*best, *probabilities_TK.argmax(1).tolist()]))
    return {
        "locations": locations_T2.round(2).tolist(),
        "boxes": boxes_TS4.round(2).tolist(),
        "patches": [[data_uri(np.asarray(patch), "PNG") for patch in some] for some in patches],
        "classes": classes,
        "probabilities": probabilities_TK[:, classes].round(5).tolist(),
    }


def _detections(given: Mapping[str, Any], pack: Pack) -> dict[str, Any]:
    boxes_N4, maps_Nhw = (np.asarray(given[name], float) for name in ("boxes", "maps"))
    labels, scores = list(given["labels"]), [float(score) for score in given["scores"]]
    boxes_N4 = boxes_N4.reshape(-1, 4)
    if not len(boxes_N4) == len(labels) == len(scores) == len(maps_Nhw):
        raise UsageError(
            f"there are {len(boxes_N4)} boxes, {len(labels)} labels, {len(scores)} scores and {len(maps_Nhw)} maps; "
            "give one of each a box"
        )
    return {
        "boxes": boxes_N4.round(2).tolist(),
        "labels": [label if isinstance(label, str) else int(label) for label in labels],
        "scores": [round(score, 5) for score in scores],
        "maps": [_scaled(map_hw, pack) for map_hw in maps_Nhw],
        "shows": str(given.get("shows", "")),
    }


def _classes(picture: Mapping[str, Any]) -> list[int]:
    """Indices of the classes that are told of an image."""
    some = [index for index, _ in picture["answer"]]
    if picture["glimpses"]:
        some += picture["glimpses"]["classes"]
    if picture["detections"]:
        some += [label for label in picture["detections"]["labels"] if isinstance(label, int)]
    return [int(index) for index in some]


def _scaled(values_hw: NDArray[np.floating], pack: Pack) -> dict[str, Any]:
    """A map in 256 levels between its smallest and its largest value."""
    low, high = float(np.min(values_hw)), float(np.max(values_hw))
    codes = np.rint((values_hw - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    return {"low": low, "high": high, "codes": pack.add(codes)}


def _likeliest(scores_K: NDArray[np.float32] | None) -> list[list[float]]:
    if scores_K is None:
        return []
    return [[int(index), round(float(scores_K[index]), 5)] for index in np.argsort(-scores_K, kind="stable")[:_TOLD]]


@lru_cache(maxsize=3)
def _shipped(name: str) -> str:
    """A file of the page; without a name, all its scripts."""
    folder = files("visionattn.explorer") / "static"
    if not name:
        return '"use strict";\n' + "\n".join(_shipped(script) for script in _SCRIPTS)
    return (folder / name).read_text("utf-8")


def _digest(text: str) -> str:
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"


def data_uri(picture_HWC: NDArray[np.uint8], kind: str = "WEBP") -> str:
    content = io.BytesIO()
    Image.fromarray(picture_HWC).save(content, kind, **({"quality": 82} if kind == "WEBP" else {}))
    return f"data:image/{kind.lower()};base64,{_base64(content.getvalue())}"


def _ramp(colormap: str) -> bytes:
    """256 colours, red green blue."""
    levels = np.arange(256, dtype=np.float32)[None] / 255
    return heat(levels, colormap=colormap).tobytes()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
