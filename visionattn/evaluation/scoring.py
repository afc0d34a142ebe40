"""Score heatmap methods and controls on the same images.

Shapes: B images in a batch, C channels, H × W pixels, h × w cells of a heatmap.
"""

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias, TypedDict

import torch
from torch import Tensor, nn

from visionattn.capture import unwrap
from visionattn.errors import DataError, MapWarning, UsageError, nearest
from visionattn.evaluation.controls import METRICS, controls_of
from visionattn.evaluation.faithfulness import STEPS, deletion_perturbation, insertion_perturbation, perturbation_curve
from visionattn.evaluation.grids import CELLS, Grids, grid_pointing, image_grids
from visionattn.evaluation.imputation import FRACTIONS, impute, road
from visionattn.evaluation.localisation import energy, hit_share, inside, overlap
from visionattn.evaluation.outside import FolderMaps, FunctionMethod, MapFunction, different_sizes
from visionattn.evaluation.randomisation import rank_correlation, shuffled
from visionattn.evaluation.salience_groups import GROUPS, saco
from visionattn.evaluation.scores import Scores
from visionattn.files import printable
from visionattn.maps import Method, methods_that_fit, normalise

DEFAULT_METRICS = ("deletion", "insertion", "pointing", "energy", "iou", "shuffled")
"""The metrics that `score` measures unless told otherwise. `road` and `saco` cost about as much again as `deletion` and
`insertion` (see `evaluation/README.md`), and `grid` needs images of several classes in a batch."""
_SLOW = 16  # forward passes above which a method gets one image at a time
_CONTROLS = 3  # controls of one method, for the expected time


def score(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    methods: Mapping[str, Method | FolderMaps | MapFunction] | None = None,
    *,
    metrics: Sequence[str] | None = None,
    steps: int = STEPS,
    copies: int = 3,
    batch_size: int = 32,
    seed: int = 0,
    advance: Callable[[float], None] | None = None,
    expect: Callable[[Mapping[str, float]], None] | None = None,
) -> Scores:
    """Score heatmap methods, and the controls that they must beat, on the same images.

    Every map explains the model's prediction for the whole image, whether or not the prediction is correct. The
    controls are a Gaussian at the centre, and a random map and an edge detector on the grid of each method.

    Args:
        model: any vision model; unchanged afterwards.
        batches: dicts with `image` (B, C, H, W), and optionally `box` (B, 4) xyxy in pixels, `mask` (B, H, W), `label`
            (B,), or (B, K) of 0 and 1, and `path` (B strings). All images have the same size, and all batches have the
            same keys.
        methods: name → method, or a function (model, images, target) → heatmaps (B, h, w), or a folder of heatmaps
            (default: every fast method that fits the model, see `methods_that_fit`).
        metrics: names of metrics, keys of `METRICS` (default: `DEFAULT_METRICS`); those that the data does not allow
            are left out.
        steps: steps of deletion and insertion, ≥ 2.
        copies: copies of the model with shuffled weights, ≥ 1.
        batch_size: perturbed images in one forward pass.
        seed: seed of all random numbers, in [0, 2³²).
        advance: called with the number of images scored since the previous call. The number may be a fraction: each
            heatmap counts in proportion to its expected time.
        expect: called once, before the first heatmap, with the expected seconds for one image of each method and of
            `"controls"`. The estimate is the time of a measured forward pass times the number of passes, see
            `Method.passes`, and for `road` the measured time of filling in pixels.

    Raises:
        UsageError: no method fits, there is no metric of a name, the data allows none of the metrics, the sizes of
            images differ, the keys of batches differ, a method has the name of a control, or an argument is out of
            range.
        DataError: there are no images, or the images or the model's output hold NaN or infinity.
    """
    if copies < 1 or steps < 2:
        raise UsageError(f"copies must be ≥ 1 and steps ≥ 2, got {copies} and {steps}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must be in [0, 2³²), got {seed}")
    wanted = check_metrics(metrics)
    sources: Mapping[str, Method | FolderMaps] | None = None
    if methods is not None:
        sources = {
            name: method if isinstance(method, (Method, FolderMaps)) else FunctionMethod(method)
            for name, method in methods.items()
        }
    model = unwrap(model)
    like = next(model.parameters(), torch.zeros(()))
    copies = copies if "shuffled" in wanted else 0
    randoms = [shuffled(model, seed=seed + number) for number in range(copies)]
    measured: dict[str, list[dict[str, Tensor]]] = {}  # method or control → metrics of each batch
    failed: dict[str, Exception] = {}
    controls: dict[str, tuple[str, ...]] = {}
    right: list[Tensor] = []
    paths: list[str] = []
    kind: _Kind | None = None
    grids: dict[str, tuple[int, ...]] = {}  # method → (h, w) of its heatmaps
    images = 0
    passes: dict[str, int] = {}  # method → forward passes for the heatmaps of an image
    spent: dict[str, float] = {}  # method or controls → expected seconds for an image
    for batch in batches:
        images_BCHW = batch["image"].to(like.device, like.dtype)
        kind = _same_kind(batch, kind)
        started = time.perf_counter()
        removal = deletion_perturbation(model, images_BCHW)
        target_B = removal.target
        assert isinstance(target_B, Tensor)
        middle = time.perf_counter()
        restoration = insertion_perturbation(model, images_BCHW, target=target_B)
        faster = min(middle - started, time.perf_counter() - middle)  # each has run the model twice
        if sources is None:
            sources = methods_that_fit(model, images_BCHW)
        if not passes:
            times = 1 + copies + ("grid" in wanted) * CELLS**2
            passes = {name: times * _passes(method, model, images_BCHW) for name, method in sources.items()}
            second = faster / 2 / len(images_BCHW)
            of_map = second * _passes_of_map(wanted, steps) + _seconds_of_imputation(wanted, images_BCHW)
            spent = {name: second * count + of_map for name, count in passes.items()} | {"controls": _CONTROLS * of_map}
            if expect:
                expect(spent)
        left = float(len(images_BCHW))  # images of this batch that were not yet reported
        maps: dict[str, tuple[Tensor, Tensor]] = {}
        for name, method in sources.items():
            if name in failed:
                continue
            try:
                # slow methods get one image at a time, so that the progress can be reported
                size = 1 if passes[name] > _SLOW * times else len(images_BCHW)
                parts = []
                for part_BCHW, part_B in zip(images_BCHW.split(size), target_B.split(size), strict=True):
                    explained = (
                        _read(method, batch, images_BCHW)
                        if isinstance(method, FolderMaps)
                        else _explain(method, model, randoms, part_BCHW, part_B)
                    )
                    parts.append(explained)
                    if advance:
                        done = len(part_BCHW) * second * passes[name] / sum(spent.values())
                        advance(done)
                        left -= done
                heatmaps, similar = zip(*parts, strict=True)
                grid = tuple(heatmaps[0].shape[1:])
                if grids.setdefault(name, grid) != grid:
                    raise DataError(different_sizes(grids[name], grid))
                maps[name] = torch.cat(heatmaps), torch.cat(similar)
            except (UsageError, DataError) as error:
                failed[name] = error
        if not maps:
            raise next(iter(failed.values()), UsageError("there is no method to score; pass at least one"))
        controls_by_method = {name: controls_of(maps[name][0], seed=seed) for name in maps}
        controls = {name: tuple(group) for name, group in controls_by_method.items()}
        unique = {name: control for group in controls_by_method.values() for name, control in group.items()}
        for name, control in unique.items():
            if name in sources:
                raise UsageError(f"{name!r} is the name of a control; rename the method")
            # a control does not depend on the model, so shuffled weights leave its map unchanged
            maps[name] = control(model, images_BCHW).heatmaps, torch.ones(len(images_BCHW))
        options = _Options(batch_size=batch_size, seed=seed + images)
        pictures = image_grids(model, images_BCHW, target_B, seed=seed + images) if "grid" in wanted else None
        for name, (heatmaps_Bhw, shuffled_B) in maps.items():
            found = {"shuffled": shuffled_B, **_localisation(batch, heatmaps_Bhw, images_BCHW)}
            if "deletion" in wanted:
                found["deletion"] = perturbation_curve(model, removal, heatmaps_Bhw, steps=steps, **options).auc
            if "insertion" in wanted:
                found["insertion"] = perturbation_curve(model, restoration, heatmaps_Bhw, steps=steps, **options).auc
            if "road" in wanted:
                found["road"] = road(model, images_BCHW, heatmaps_Bhw, target=target_B, **options)
            if "saco" in wanted:
                found["saco"] = saco(model, images_BCHW, heatmaps_Bhw, target=target_B, **options)
            if pictures is not None:
                found["grid"] = _on_grids(unique.get(name) or sources[name], model, pictures, target_B)
            kept = {metric: value.cpu() for metric, value in found.items() if metric in wanted}
            if not kept:
                raise UsageError(
                    f"{' and '.join(wanted)} cannot be measured, since the images have no boxes or masks; choose other "
                    "metrics"
                )
            measured.setdefault(name, []).append(kept)
            if advance:
                advance(left / len(maps))
        if "label" in batch:
            label = batch["label"].to(target_B.device)
            hits_B = label == target_B if label.ndim == 1 else label.gather(1, target_B[:, None])[:, 0] > 0
            right.append(hits_B)
        paths += batch.get("path", ())
        images += len(images_BCHW)
    if not images:
        raise DataError("there are no images to score; pass at least one batch")
    scored = [*controls, *dict.fromkeys(name for group in controls.values() for name in group)]
    return Scores(
        values={
            name: {metric: torch.cat([part[metric] for part in measured[name]]).numpy() for metric in measured[name][0]}
            for name in scored
        },
        controls=controls,
        failed={name: str(error) for name, error in failed.items()},
        accuracy=float(torch.cat(right).float().mean()) if right else None,
        paths=tuple(paths),
        seed=seed,
    )


class _Options(TypedDict):
    batch_size: int
    seed: int


def check_metrics(metrics: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of metrics in the order of `METRICS`, the default ones for None.

    Raises:
        UsageError: there is no metric of a name, or no name at all.
    """
    chosen = DEFAULT_METRICS if metrics is None else tuple(metrics)
    for name in chosen:
        if name not in METRICS:
            raise UsageError(f"there is no metric {name!r}.{nearest(name, METRICS)} All: {', '.join(METRICS)}.")
    if not chosen:
        raise UsageError("there is no metric to measure; pass at least one")
    return tuple(name for name in METRICS if name in chosen)


def _passes_of_map(wanted: Sequence[str], steps: int) -> int:
    """Return the forward passes of an image that the metrics of one heatmap cost."""
    costs = {"deletion": steps - 1, "insertion": steps - 1, "road": 2 * len(FRACTIONS), "saco": GROUPS}
    return sum(cost for metric, cost in costs.items() if metric in wanted)


def _seconds_of_imputation(wanted: Sequence[str], images_BCHW: Tensor) -> float:
    """Return the seconds that `road` takes to fill in the pixels of an image for one heatmap, from a trial."""
    if "road" not in wanted:
        return 0.0
    gone_HW = torch.zeros(images_BCHW.shape[2:], dtype=torch.bool, device=images_BCHW.device)
    gone_HW[: len(gone_HW) // 2] = True
    started = time.perf_counter()
    some_BCHW = images_BCHW[:8]  # more than one, since images are filled in together
    impute(some_BCHW, gone_HW.expand(len(some_BCHW), -1, -1))
    return 2 * len(FRACTIONS) * (time.perf_counter() - started) / len(some_BCHW)


def _on_grids(method: Method | FolderMaps, model: nn.Module, grids: Grids, target_B: Tensor) -> Tensor:
    """Return `grid_pointing` of a method; NaN if it cannot make the heatmaps of grids."""
    if isinstance(method, FolderMaps):
        return torch.full((len(target_B),), torch.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)
        try:
            return grid_pointing(model, grids, target_B, method)
        except (UsageError, DataError):
            return torch.full((len(target_B),), torch.nan)


def _passes(method: Method | FolderMaps, model: nn.Module, images_BCHW: Tensor) -> int:
    if isinstance(method, FolderMaps):
        return 0
    try:
        return method.passes(model, images_BCHW)
    except (UsageError, DataError):  # the method does not fit the model; `score` reports why
        return 1


def _explain(
    method: Method, model: nn.Module, randoms: Sequence[nn.Module], images_BCHW: Tensor, target_B: Tensor
) -> tuple[Tensor, Tensor]:
    """Return a method's heatmaps, and their similarity to those of models with shuffled weights; NaN without such."""
    heatmaps_Bhw = method(model, images_BCHW, target=target_B).heatmaps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # maps of a model with shuffled weights are often constant
        others = [method(random, images_BCHW, target=target_B).heatmaps for random in randoms]
    similar = [rank_correlation(heatmaps_Bhw, other_Bhw).abs() for other_Bhw in others]
    return heatmaps_Bhw, torch.stack(similar).mean(0) if similar else torch.full((len(images_BCHW),), torch.nan)


def _read(folder: FolderMaps, batch: Mapping[str, Any], images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return a folder's heatmaps, scaled as a method's are, and NaN for their similarity."""
    raw_Bhw = folder.of_batch(batch).to(images_BCHW.device)
    heatmaps_Bhw = normalise(raw_Bhw, "outside", printable(folder.folder))
    return heatmaps_Bhw, torch.full((len(images_BCHW),), torch.nan)


def _localisation(batch: Mapping[str, Any], heatmaps_Bhw: Tensor, images_BCHW: Tensor) -> dict[str, Tensor]:
    device, size = heatmaps_Bhw.device, (images_BCHW.shape[2], images_BCHW.shape[3])
    box_BHW = inside(batch["box"].to(device), size) if "box" in batch else None
    mask_BHW = batch["mask"].to(device, torch.bool) if "mask" in batch else box_BHW
    if mask_BHW is None:
        return {}
    if box_BHW is None:
        box_BHW = mask_BHW
    return {
        "pointing": hit_share(heatmaps_Bhw, box_BHW),
        "energy": energy(heatmaps_Bhw, box_BHW),
        "iou": overlap(heatmaps_Bhw, mask_BHW),
    }


_Kind: TypeAlias = tuple[tuple[int, ...], set[str]]
"""What all batches have in common: the shape (C, H, W) of the images, and which of box, mask and label exist."""


def _same_kind(batch: Mapping[str, Any], before: _Kind | None) -> _Kind:
    """Return the kind of a batch; raise if it differs from the kind of the batches before."""
    kind = tuple(batch["image"].shape[1:]), {"box", "mask", "label"} & batch.keys()
    if before is not None and kind != before:
        now, then = (
            f"images of {shape} with {', '.join(sorted(known)) or 'nothing'}" for shape, known in (kind, before)
        )
        raise UsageError(f"batches differ: {now} after {then}; give every batch the same size and keys")
    return kind
