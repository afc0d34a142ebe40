"""The analysis of one image for the page: attention, gates, heatmaps by every method, and their scores.

Shapes: B images (always one), W windows, H heads, Q queries, K keys, C channels, S steps, h × w grid.
"""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.capture import FullAttention, Record, Records, Site, capture, on_grid, run, survey_images, undisturbed
from visionattn.errors import DataError, MapWarning, UsageError
from visionattn.evaluation import (
    Perturbation,
    controls_of,
    deletion_perturbation,
    insertion_perturbation,
    margin,
    perturbation_curve,
)
from visionattn.explorer.encoding import Rows
from visionattn.maps import Heatmaps, Method, Target, label_threshold, probabilities_of, scores_of

CHANNELS = 8
"""Number of channels per gate for which the page shows feature maps; the strongest channels are shown."""

NOISE = 0.1
"""Difference between the areas of two curves of one image that is not counted. On four photographs with
EfficientNet-Lite0, the areas of six random maps of 7 × 7 had standard deviations of .01 to .09."""

_MOST_CELLS = 56  # largest height and width of a map on the page; larger maps are averaged down to this size


@dataclass(frozen=True)
class Attention:
    """One layer's attention in one image.

    Attributes:
        name: name of the module.
        heads: H, the number of heads.
        grid: (h, w) of the keys.
        query_grid: (h, w) of the queries; None for queries without positions.
        asks: label of the rows in `whole`, shown on the page: "class token", or "all patches, on average".
        class_at: index of the class token among the keys; None without a class token.
        queries: (W, Q) int32, the cell of each query, −1 for class and register tokens; None for queries without
            positions.
        keys: (W, K) int32, the cell of each key; keys without a position in any window come last.
        whole: the rows (W · H, K) of the class token; without a class token, the mean rows over all patches.
        rows: the rows (W · H · Q, K) of all queries; None for queries without positions.
        chains: whether queries and keys are the same tokens, so that rollout can multiply layers.
    """

    name: str
    heads: int
    grid: tuple[int, int]
    query_grid: tuple[int, int] | None
    asks: str
    class_at: int | None
    queries: NDArray[np.int32] | None
    keys: NDArray[np.int32]
    whole: "Weights"
    rows: "Weights | None"
    chains: bool


@dataclass(frozen=True)
class Weights:
    """Rows of attention, encoded in two parts.

    Tokens without a position (class and register tokens, padding) often get most of the attention. If they were encoded
    together with the grid, only few levels would remain for the weights on the grid.

    Attributes:
        placed: the weights of keys on the grid.
        rest: the weights of keys without a position; None if there are none.
    """

    placed: Rows
    rest: Rows | None


@dataclass(frozen=True)
class SpatialGate:
    """A gate over positions, (h, w)."""

    name: str
    weights: NDArray[np.float32]


@dataclass(frozen=True)
class ChannelGate:
    """A gate over channels.

    Attributes:
        name: name of the gate.
        weights: (C,), the gate's weights.
        channels: indices of the strongest channels, in descending order of their weights.
        features: (len(channels), h, w), the feature maps of these channels; None if they were not found.
    """

    name: str
    weights: NDArray[np.float32]
    channels: NDArray[np.int32]
    features: NDArray[np.float32] | None


@dataclass(frozen=True)
class AnalysedHeatmap:
    """The heatmap of a method or a control, and its deletion and insertion curves.

    Attributes:
        name: name of the method or control.
        source: what the heatmap shows.
        values: (h, w) in [0, 1].
        raw: the smallest and the largest value before the map was scaled to [0, 1].
        control: whether this is a control.
        deletion, insertion: (S + 1,) probabilities of the curve; None if no curves were computed.
        compared: metric → "better", "same" or "worse" → the controls that the heatmap is better than, as good as, or
            worse than on this image. Areas that differ by less than `NOISE` count as the same. Empty for a control.
    """

    name: str
    source: str
    values: NDArray[np.float32]
    raw: tuple[float, float]
    control: bool = False
    deletion: tuple[float, ...] | None = None
    insertion: tuple[float, ...] | None = None
    compared: Mapping[str, Mapping[str, tuple[str, ...]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """The analysis of one image.

    Attributes:
        scores: (K,) probabilities of the outputs; None if the model has no scores.
        target: index of the output that is explained; None if the model has no scores.
        attention: the attention of every layer.
        gates: the gates of the model.
        heatmaps: heatmaps of the methods, then of the controls.
        failed: method → the reason why it has no heatmap.
    """

    scores: NDArray[np.float32] | None
    target: int | None
    attention: Sequence[Attention] = ()
    gates: Sequence[SpatialGate | ChannelGate] = ()
    heatmaps: Sequence[AnalysedHeatmap] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


def analyse(
    model: nn.Module, image_1CHW: Tensor, methods: Mapping[str, Method], *, steps: int, batch_size: int
) -> Analysis:
    """Analyse one image: attention, gates, and the heatmaps of methods.

    Args:
        model: any vision model; unchanged afterwards.
        image_1CHW: the image, normalised for the model.
        methods: name → method.
        steps: steps of deletion and insertion; 0 for no curves.
        batch_size: perturbed images in one forward pass.

    Raises:
        DataError: the model's output is not finite.
    """
    with undisturbed(model) as bare:
        survey = survey_images(bare, image_1CHW)
        gates = [name for name, spatial in survey.gates.items() if not spatial]
        with _features(bare, gates) as features:
            if survey.attention or survey.gates:
                with capture(bare, FullAttention()) as records:
                    output = run(bare, image_1CHW)
            else:
                records, output = Records(), run(bare, image_1CHW)
        scores_K = _probabilities(bare, output)
        attention = [
            _attention(site, record)
            for site, record in zip(survey.attention, records.attention, strict=False)
            if record.weights is not None
        ]
        gates_shown = _gates(records, features)
    target = None if scores_K is None else int(scores_K.argmax())
    heatmaps, failed = _heatmaps(model, image_1CHW, methods, target, steps, batch_size)
    return Analysis(scores_K, target, attention, gates_shown, heatmaps, failed)


def _probabilities(model: nn.Module, output: object) -> NDArray[np.float32] | None:
    """Return the probabilities of the model's scores, (K,); None if the output has no scores of two classes or more."""
    if getattr(model, "num_classes", None) == 0:  # a timm model without its head returns features
        return None
    try:
        scores_1K = scores_of(output).float()
    except UsageError:
        return None
    if scores_1K.shape[1] < 2 and label_threshold(model) is None:
        return None
    if not scores_1K.isfinite().all():
        raise DataError("the model's output is not finite; check its weights, or try float32")
    probabilities_K: NDArray[np.float32] = probabilities_of(model, scores_1K)[0].cpu().numpy()
    return probabilities_K


def _attention(site: Site, record: Record) -> Attention:
    assert record.weights is not None
    weights_WHQK = record.weights[0].cpu()
    keys_WK = site.keys.of_image(0).index_WN
    queries = None if site.queries is None else site.queries.of_image(0)
    if site.class_query is not None:
        whole_WHK = weights_WHQK[:, :, site.class_query]
    else:
        first = queries.num_prefix_tokens if queries is not None else 0
        whole_WHK = weights_WHQK[:, :, first:].mean(2)
    chains = queries is not None and not site.windowed and torch.equal(queries.index_WN, keys_WK)
    placed_K = (keys_WK >= 0).any(0)
    order = torch.argsort((~placed_K).int(), stable=True)
    count = int(placed_K.sum())
    if chains:  # queries are the same tokens as keys, so they are sorted in the same way
        weights_WHQK = weights_WHQK[:, :, order]
    queries_WQ = None if queries is None else queries.index_WN[:, order] if chains else queries.index_WN
    class_at = None if site.class_query is None or not chains else int((order == site.class_query).nonzero())

    def rows(weights_RK: Tensor) -> Weights:
        values_RK = weights_RK[:, order].numpy()
        rest = Rows.of(values_RK[:, count:]) if count < len(order) else None
        return Weights(Rows.of(values_RK[:, :count]), rest)

    return Attention(
        name=record.name,
        heads=weights_WHQK.shape[1],
        grid=site.grid,
        query_grid=None if queries is None else queries.grid,
        asks="class token" if site.class_query is not None else "all patches, on average",
        class_at=class_at,
        queries=None if queries_WQ is None else queries_WQ.numpy().astype(np.int32),
        keys=keys_WK[:, order].numpy().astype(np.int32),
        whole=rows(whole_WHK.flatten(0, 1)),
        rows=None if queries is None else rows(weights_WHQK.flatten(0, 2)),
        chains=chains,
    )


def _gates(records: Records, features: Mapping[str, Tensor]) -> list[SpatialGate | ChannelGate]:
    """Return the gates of the records, without the suffixes that `insert` adds to their names."""
    gates: list[SpatialGate | ChannelGate] = []
    for name in dict.fromkeys(record.name for record in records.gates):
        calls = [record for record in records.gates if record.name == name]
        shown = name.removesuffix(".gate").replace(".inserted.mechanism", "")
        weights = calls[-1].weights
        assert weights is not None
        if calls[-1].kind == "spatial_gate" and calls[-1].grid != (1, 1):
            gates.append(SpatialGate(shown, _coarse(on_grid(calls))[0].cpu().numpy()))
            continue
        weights_C = weights[0, :, 0, 0].cpu()
        order = weights_C.argsort(descending=True, stable=True)[:CHANNELS]
        maps = features.get(name)
        if maps is not None and maps.shape[1] == len(weights_C):
            shown_Chw = _coarse(maps[0, order].float()).cpu().numpy()
        else:
            shown_Chw = None
        gates.append(ChannelGate(shown, weights_C.numpy(), order.numpy().astype(np.int32), shown_Chw))
    return gates


@contextlib.contextmanager
def _features(model: nn.Module, gates: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict: name of a gate over channels → the feature maps that the gate multiplies. A forward pass fills it.

    The maps are the first argument of the innermost module that contains the gate and takes a feature map.
    """
    kept: dict[str, Tensor] = {}
    handles = []

    def keep(gate: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def hook(module: nn.Module, args: tuple[object, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].ndim == 4 and args[0].shape[2:].numel() > 1:
                kept[gate] = args[0].detach().clone()  # the innermost module is called last and overwrites the others

        return hook

    for gate in gates:
        around = gate
        while "." in around:
            around = around.rpartition(".")[0]
            handles.append(model.get_submodule(around).register_forward_pre_hook(keep(gate)))
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


def _coarse(maps: Tensor) -> Tensor:
    """Reduce maps (N, h, w) to at most `_MOST_CELLS` cells per side, by averaging cells."""
    height, width = (min(side, _MOST_CELLS) for side in maps.shape[-2:])
    same = (height, width) == tuple(maps.shape[-2:])
    return maps if same else F.adaptive_avg_pool2d(maps[None], (height, width))[0]


def _heatmaps(
    model: nn.Module, image_1CHW: Tensor, methods: Mapping[str, Method], target: Target, steps: int, batch_size: int
) -> tuple[list[AnalysedHeatmap], dict[str, str]]:
    """Return the heatmaps of methods and controls with their curves, and the reasons why methods failed."""
    found: dict[str, tuple[Heatmaps, str]] = {}
    controls: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # a constant map is visible on the page
        for name, method in methods.items():
            try:
                maps = method(model, image_1CHW, target=target)
            except (UsageError, DataError) as error:
                failed[name] = str(error)
                continue
            found[name] = maps, maps.source
        for name in list(found) if steps and target is not None else []:
            for label, control in controls_of(found[name][0].heatmaps).items():
                controls.setdefault(name, []).append(label)
                if label not in found:
                    found[label] = control(model, image_1CHW), "no layer"
    curves: dict[str, dict[str, tuple[float, ...]]] = {}
    if controls:
        removal = deletion_perturbation(model, image_1CHW, target=target)
        restoration = insertion_perturbation(model, image_1CHW, target=target)
        for name, (maps, _) in found.items():
            curves[name] = {
                "deletion": _curve(model, removal, maps.heatmaps, steps, batch_size),
                "insertion": _curve(model, restoration, maps.heatmaps, steps, batch_size),
            }
    return [
        AnalysedHeatmap(
            name,
            source,
            _coarse(maps.heatmaps)[0].cpu().numpy(),
            (maps.raw.amin().item(), maps.raw.amax().item()),
            control=name not in methods,
            **curves.get(name, {}),
            compared=_compared(curves, name, controls.get(name, [])),
        )
        for name, (maps, source) in found.items()
    ], failed


def _curve(
    model: nn.Module, change: Perturbation, heatmap_1hw: Tensor, steps: int, batch_size: int
) -> tuple[float, ...]:
    return tuple(perturbation_curve(model, change, heatmap_1hw, steps=steps, batch_size=batch_size).scores[0].tolist())


def _compared(
    curves: Mapping[str, Mapping[str, tuple[float, ...]]], name: str, controls: Sequence[str]
) -> dict[str, dict[str, tuple[str, ...]]]:
    """Return metric → outcome → controls, by the area under each curve; see `AnalysedHeatmap.compared`."""
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for metric, scores in curves.get(name, {}).items() if controls else ():
        ahead = {control: margin(metric, area(scores), area(curves[control][metric])) for control in controls}
        found[metric] = {
            "better": tuple(control for control, more in ahead.items() if more >= NOISE),
            "same": tuple(control for control, more in ahead.items() if abs(more) < NOISE),
            "worse": tuple(control for control, more in ahead.items() if more <= -NOISE),
        }
    return found


def area(scores: Sequence[float]) -> float:
    """Return the area under a curve of equal steps by the trapezoidal rule."""
    return (sum(scores) - (scores[0] + scores[-1]) / 2) / (len(scores) - 1)
