"""The HTML document of the page: the data of each image, and the file that holds data, scripts and styles.

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
from typing import Any, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from visionattn.data import Placement
from visionattn.drawing import COLORMAPS, heat
from visionattn.errors import UsageError
from visionattn.explorer.analysis import AnalysedHeatmap, Analysis, Attention, ChannelGate, SpatialGate, Weights, area
from visionattn.explorer.encoding import LEVELS, EncodedArrays

GENERATOR = "visionattn explore"

Arrays: TypeAlias = Mapping[str, Any]
"""Name → array, nested list or text, as users pass them in `glimpses` and `detections` of `explore`."""

Json: TypeAlias = dict[str, object]

_CLASSES = 5  # number of most probable classes on the page
_SCRIPTS = "data.js", "attention.js", "draw.js", "parts.js", "shown.js", "panels.js", "page.js"


@dataclass(frozen=True)
class PageImage:
    """One image of the page.

    Attributes:
        name: name of the image.
        source: the picture as a data URI.
        size: (width, height) of this picture.
        placement: position of the image in the model's input.
        analysis: the analysis of the image.
        glimpses: locations, boxes, patches and probabilities of glimpses, or None; see `explore`.
        detections: boxes, labels, scores and maps of detections, or None; see `explore`.
    """

    name: str
    source: str
    size: tuple[int, int]
    placement: Placement
    analysis: Analysis
    glimpses: Arrays | None = None
    detections: Arrays | None = None


class _Glimpses(TypedDict):
    locations: list[list[float]]
    boxes: list[list[list[float]]]
    patches: list[list[str]]
    classes: list[int]
    probabilities: list[list[float]]


class _Detections(TypedDict):
    boxes: list[list[float]]
    labels: list[str | int]
    scores: list[float]
    maps: list[Json]
    shows: str


class _Picture(TypedDict):
    """The data of one image as the scripts read it (`Picture` in data.js)."""

    name: str
    size: list[int]
    shown: tuple[int, int]
    source: str
    matrix: list[float]
    input: list[int]
    answer: list[list[float]]
    attention: list[Json]
    gates: list[Json]
    heatmaps: list[Json]
    failed: dict[str, str]
    glimpses: _Glimpses | None
    detections: _Detections | None


def build_document(shown: Sequence[PageImage], levels: int, model_name: str, class_names: Sequence[str]) -> str:
    """Return the HTML file.

    Args:
        shown: the images.
        levels: number of levels for the attention rows of patches; one of `LEVELS`.
        model_name: name of the model in the title.
        class_names: names of the model's outputs.
    """
    packs = [EncodedArrays() for _ in shown]
    pictures = [_picture(image, pack, levels) for image, pack in zip(shown, packs, strict=True)]
    indices = {index for picture in pictures for index in _classes(picture)}
    facts = {
        "model": model_name,
        "classes": {index: class_names[index] for index in sorted(indices) if index < len(class_names)},
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


def _picture(image: PageImage, pack: EncodedArrays, levels: int) -> _Picture:
    """Return the data of an image; its large arrays go into the pack."""
    placement, analysis = image.placement, image.analysis
    height, width = placement.source_size
    return {
        "name": image.name,
        "size": [width, height],
        "shown": image.size,
        "source": image.source,
        "matrix": [round(float(value), 6) for value in placement.matrix.ravel()],
        "input": [placement.input_size[1], placement.input_size[0]],
        "answer": _most_probable(analysis.scores),
        "attention": [_attention(layer, pack, levels) for layer in analysis.attention],
        "gates": [_gate(gate, pack) for gate in analysis.gates],
        "heatmaps": [_heatmap(heatmap, pack) for heatmap in analysis.heatmaps],
        "failed": dict(analysis.failed),
        "glimpses": None if image.glimpses is None else _glimpses(image.glimpses),
        "detections": None if image.detections is None else _detections(image.detections, pack),
    }


def _attention(layer: Attention, pack: EncodedArrays, levels: int) -> Json:
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


def _weights(weights: Weights, pack: EncodedArrays, levels: int) -> list[Json]:
    parts = [weights.placed.encode_into(pack, levels)]
    return parts if weights.rest is None else [*parts, weights.rest.encode_into(pack, LEVELS[0])]


def _gate(gate: SpatialGate | ChannelGate, pack: EncodedArrays) -> Json:
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


def _heatmap(heatmap: AnalysedHeatmap, pack: EncodedArrays) -> Json:
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
        "raw": [float(f"{value:.4g}") for value in heatmap.raw],
        "curves": curves,
        "compared": {
            metric: {outcome: list(names) for outcome, names in found.items()}
            for metric, found in heatmap.compared.items()
        },
    }


def _glimpses(glimpses: Arrays) -> _Glimpses:
    locations_T2, boxes_TS4 = (np.asarray(glimpses[name], float) for name in ("locations", "boxes"))
    probabilities_TK, patches = np.asarray(glimpses["probabilities"], float), glimpses["patches"]
    counts = {len(part) for part in (locations_T2, boxes_TS4, probabilities_TK, patches)}
    if len(counts) != 1 or locations_T2.shape[1:] != (2,) or boxes_TS4.ndim != 3 or boxes_TS4.shape[2] != 4:
        raise UsageError(
            "glimpses are locations (T, 2), boxes (T, S, 4), patches (T, S, h, w, 3) and probabilities (T, K); got "
            f"{locations_T2.shape}, {boxes_TS4.shape}, {len(patches)} and {probabilities_TK.shape}"
        )
    best = np.argsort(-probabilities_TK[-1], kind="stable")[:_CLASSES].tolist()
    classes = list(dict.fromkeys([*best, *probabilities_TK.argmax(1).tolist()]))
    return {
        "locations": locations_T2.round(2).tolist(),
        "boxes": boxes_TS4.round(2).tolist(),
        "patches": [[data_uri(np.asarray(patch), "PNG") for patch in scales] for scales in patches],
        "classes": classes,
        "probabilities": probabilities_TK[:, classes].round(5).tolist(),
    }


def _detections(detections: Arrays, pack: EncodedArrays) -> _Detections:
    boxes_N4, maps_Nhw = (np.asarray(detections[name], float) for name in ("boxes", "maps"))
    labels, scores = list(detections["labels"]), [float(score) for score in detections["scores"]]
    boxes_N4 = boxes_N4.reshape(-1, 4)
    if not len(boxes_N4) == len(labels) == len(scores) == len(maps_Nhw):
        raise UsageError(
            f"there are {len(boxes_N4)} boxes, {len(labels)} labels, {len(scores)} scores and {len(maps_Nhw)} maps; "
            "pass one label, score and map for each box"
        )
    return {
        "boxes": boxes_N4.round(2).tolist(),
        "labels": [label if isinstance(label, str) else int(label) for label in labels],
        "scores": [round(score, 5) for score in scores],
        "maps": [_scaled(map_hw, pack) for map_hw in maps_Nhw],
        "shows": str(detections.get("shows", "")),
    }


def _classes(picture: _Picture) -> list[int]:
    """Return the indices of the classes that occur in the data of an image."""
    indices = [index for index, _ in picture["answer"]]
    if picture["glimpses"]:
        indices += picture["glimpses"]["classes"]
    if picture["detections"]:
        indices += [label for label in picture["detections"]["labels"] if isinstance(label, int)]
    return [int(index) for index in indices]


def _scaled(values_hw: NDArray[np.floating], pack: EncodedArrays) -> Json:
    """Encode a map in 256 levels between its smallest and its largest value."""
    low, high = float(np.min(values_hw)), float(np.max(values_hw))
    codes = np.rint((values_hw - low) * (255 / (high - low) if high > low else 0)).astype(np.uint8)
    return {"low": low, "high": high, "codes": pack.add(codes)}


def _most_probable(scores_K: NDArray[np.float32] | None) -> list[list[float]]:
    """Return [index, probability] of the most probable classes."""
    if scores_K is None:
        return []
    return [[int(index), round(float(scores_K[index]), 5)] for index in np.argsort(-scores_K, kind="stable")[:_CLASSES]]


@lru_cache(maxsize=3)
def _shipped(name: str) -> str:
    """Return the text of a file in `static/`, or of all scripts together if the name is empty."""
    folder = files("visionattn.explorer") / "static"
    if not name:
        return '"use strict";\n' + "\n".join(_shipped(script) for script in _SCRIPTS)
    return (folder / name).read_text("utf-8")


def _digest(text: str) -> str:
    return f"sha256-{_base64(hashlib.sha256(text.encode()).digest())}"


def data_uri(picture_HWC: NDArray[np.uint8], kind: str = "WEBP") -> str:
    """Encode a picture (H, W, 3) uint8 RGB as a data URI. WEBP is lossy, at quality 82; PNG is lossless."""
    content = io.BytesIO()
    Image.fromarray(picture_HWC).save(content, kind, **({"quality": 82} if kind == "WEBP" else {}))
    return f"data:image/{kind.lower()};base64,{_base64(content.getvalue())}"


def _ramp(colormap: str) -> bytes:
    """Return the 256 colours of a colormap as RGB bytes."""
    levels = np.arange(256, dtype=np.float32)[None] / 255
    return heat(levels, colormap=colormap).tobytes()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
