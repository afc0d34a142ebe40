"""What a page shows of one image: all of its attention, its gates, heatmaps by every method, and whether they hold.

Shapes: B images (one here), W windows, H heads, Q queries, K keys, C channels, S steps, h × w grid.
"""

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.capture.recording import capture
from visionattn.capture.records import Record, Records, on_grid
from visionattn.capture.reductions import Full
from visionattn.capture.running import look, run, undisturbed
from visionattn.capture.token_layout import Site
from visionattn.errors import DataError, MapWarning, UsageError
from visionattn.evaluation.controls import controls_of, lead
from visionattn.evaluation.faithfulness import Change, deleting, follow, inserting
from visionattn.explorer.encoding import Rows
from visionattn.maps.method import Method, Target, scores_of

CHANNELS = 8
"""Strongest channels of a gate whose feature maps are shown."""

_MOST_CELLS = 56  # a side; finer maps are averaged, since a page shows no more of them


@dataclass(frozen=True)
class Attention:
    """One layer's attention in one image.

    Attributes:
        name: of the module.
        heads: H.
        grid: (h, w) of the keys.
        query_grid: of the queries; None where they have no place.
        asks: whose row `whole` is: the class token's, or the mean over all patches.
        class_at: the class token's place among the keys; None without one.
        queries: (W, Q) int32, the cell of each query, −1 for class and register tokens; None with `query_grid`.
        keys: (W, K) int32, the same of the keys, those that never have a place behind the others.
        whole: rows (W · H, K).
        rows: rows (W · H · Q, K); None where only class tokens ask.
        chains: the same tokens ask and are asked, so that layers can be multiplied.
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
    """Rows of attention: to tokens that lie on the grid, and to the others (class and register tokens, padding), which
    often get most of it and would leave few levels to the grid."""

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
        weights: (C,).
        channels: the strongest, the first the strongest of all.
        features: (those, h, w), the feature maps that the gate weighs; None where they were not found.
    """

    name: str
    weights: NDArray[np.float32]
    channels: NDArray[np.int32]
    features: NDArray[np.float32] | None


@dataclass(frozen=True)
class Heatmap:
    """A method's or a control's heatmap, (h, w) in [0, 1], and how the answer follows it.

    Attributes:
        source: what is shown.
        control: it does not look at the model.
        deletion, insertion: (S + 1,) probabilities; None where they were not asked for.
        unbeaten: figure → the controls that do at least as well in this image.
    """

    name: str
    source: str
    values: NDArray[np.float32]
    control: bool = False
    deletion: tuple[float, ...] | None = None
    insertion: tuple[float, ...] | None = None
    unbeaten: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Findings:
    """All that was found in one image.

    Attributes:
        scores: (K,) probabilities of the outputs; None where the model has no such outputs.
        target: the output that is explained.
        failed: method → why it has no heatmap.
    """

    scores: NDArray[np.float32] | None
    target: int | None
    attention: Sequence[Attention] = ()
    gates: Sequence[SpatialGate | ChannelGate] = ()
    heatmaps: Sequence[Heatmap] = ()
    failed: Mapping[str, str] = field(default_factory=dict)


def find_out(
    model: nn.Module, image_1CHW: Tensor, methods: Mapping[str, Method], *, steps: int, batch_size: int
) -> Findings:
    """Look at one image in every way that fits the model.

    Args:
        model: any vision model; it is left as it was.
        image_1CHW: normalised as the model wants it.
        methods: name → method.
        steps: of deletion and insertion; 0 for none.
        batch_size: changed images in one forward pass.
    """
    with undisturbed(model) as bare:
        survey = look(bare, image_1CHW)
        gates = [name for name, spatial in survey.gates.items() if not spatial]
        with _features(bare, gates) as features:
            if survey.attention or survey.gates:
                with capture(bare, Full()) as records:
                    output = run(bare, image_1CHW)
            else:
                records, output = Records(), run(bare, image_1CHW)
        scores_K = _probabilities(bare, output)
        attention = [
            _attention(site, record)
            for site, record in zip(survey.attention, records.attention, strict=False)
            if record.weights is not None
        ]
        found_gates = _gates(records, features)
    target = None if scores_K is None else int(scores_K.argmax())
    heatmaps, failed = _heatmaps(model, image_1CHW, methods, target, steps, batch_size)
    return Findings(scores_K, target, attention, found_gates, heatmaps, failed)


def _probabilities(model: nn.Module, output: Any) -> NDArray[np.float32] | None:
    if getattr(model, "num_classes", None) == 0:  # what a timm model without its head returns are features
        return None
    try:
        scores_1K = scores_of(output).float()
    except UsageError:
        return None
    if scores_1K.shape[1] < 2:
        return None
    if not scores_1K.isfinite().all():
        raise DataError("the model's output is not finite")
    return scores_1K.softmax(1)[0].cpu().numpy()


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
    if chains:  # queries are in the order of the keys
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
    found: list[SpatialGate | ChannelGate] = []
    for name in dict.fromkeys(record.name for record in records.gates):
        calls = [record for record in records.gates if record.name == name]
        shown = name.removesuffix(".gate").replace(".inserted.mechanism", "")  # as `insert` puts them around a module
        weights = calls[-1].weights
        assert weights is not None
        if calls[-1].kind == "spatial_gate" and calls[-1].grid != (1, 1):
            found.append(SpatialGate(shown, _coarse(on_grid(calls))[0].cpu().numpy()))
            continue
        weights_C = weights[0, :, 0, 0].cpu()
        order = weights_C.argsort(descending=True, stable=True)[:CHANNELS]
        maps = features.get(name)
        if maps is not None and maps.shape[1] == len(weights_C):
            shown_Chw = _coarse(maps[0, order].float()).cpu().numpy()
        else:
            shown_Chw = None
        found.append(ChannelGate(shown, weights_C.numpy(), order.numpy().astype(np.int32), shown_Chw))
    return found


@contextlib.contextmanager
def _features(model: nn.Module, gates: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Keep what each gate over channels weighs: the first map that the nearest module around it with one is given."""
    kept: dict[str, Tensor] = {}
    handles = []

    def keep(gate: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor) and args[0].ndim == 4 and args[0].shape[2:].numel() > 1:
                kept[gate] = args[0].detach().clone()  # the innermost module is called last

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
    """Average maps (N, h, w) that are finer than a page shows."""
    height, width = (min(side, _MOST_CELLS) for side in maps.shape[-2:])
    same = (height, width) == tuple(maps.shape[-2:])
    return maps if same else F.adaptive_avg_pool2d(maps[None], (height, width))[0]


def _heatmaps(
    model: nn.Module, image_1CHW: Tensor, methods: Mapping[str, Method], target: Target, steps: int, batch_size: int
) -> tuple[list[Heatmap], dict[str, str]]:
    found: dict[str, tuple[Tensor, str]] = {}
    controls: dict[str, list[str]] = {}
    failed: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # a constant map is seen to be one
        for name, method in methods.items():
            try:
                maps = method(model, image_1CHW, target=target)
            except (UsageError, DataError) as error:
                failed[name] = str(error)
                continue
            found[name] = maps.heatmaps, maps.source
        for name in list(found) if steps and target is not None else []:
            for label, control in controls_of(found[name][0]).items():
                controls.setdefault(name, []).append(label)
                if label not in found:
                    found[label] = control(model, image_1CHW).heatmaps, "no layer"
    curves: dict[str, dict[str, tuple[float, ...]]] = {}
    if controls:
        removal = deleting(model, image_1CHW, target=target)
        restoration = inserting(model, image_1CHW, target=target)
        for name, (heatmap_1hw, _) in found.items():
            curves[name] = {
                "deletion": _curve(model, removal, heatmap_1hw, steps, batch_size),
                "insertion": _curve(model, restoration, heatmap_1hw, steps, batch_size),
            }
    return [
        Heatmap(
            name,
            source,
            _coarse(heatmap_1hw)[0].cpu().numpy(),
            control=name not in methods,
            **curves.get(name, {}),
            unbeaten=_unbeaten(curves, name, controls.get(name, [])),
        )
        for name, (heatmap_1hw, source) in found.items()
    ], failed


def _curve(model: nn.Module, change: Change, heatmap_1hw: Tensor, steps: int, batch_size: int) -> tuple[float, ...]:
    return tuple(follow(model, change, heatmap_1hw, steps=steps, batch_size=batch_size).scores[0].tolist())


def _unbeaten(
    curves: Mapping[str, Mapping[str, tuple[float, ...]]], name: str, controls: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The controls that do at least as well, by the area under each curve."""
    areas = {label: {figure: area(scores) for figure, scores in some.items()} for label, some in curves.items()}
    lost = {
        figure: tuple(control for control in controls if lead(figure, value, areas[control][figure]) <= 0)
        for figure, value in areas.get(name, {}).items()
    }
    return {figure: names for figure, names in lost.items() if names}


def area(scores: Sequence[float]) -> float:
    """Under a curve of equal steps, by trapezoids."""
    return (sum(scores) - (scores[0] + scores[-1]) / 2) / (len(scores) - 1)
