"""Scores of heatmap methods and of controls on the same images, with confidence intervals.

Shapes: N images in total, B images in a batch, C channels, H × W pixels, R resamples, T thresholds.
"""

import html
import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.capture import to_plain, unwrap
from visionattn.errors import DataError, MapWarning, UsageError
from visionattn.evaluation.controls import METRICS, controls_of, margin
from visionattn.evaluation.faithfulness import STEPS, deletion_perturbation, insertion_perturbation, perturbation_curve
from visionattn.evaluation.localisation import energy, hit_share, inside, overlap
from visionattn.evaluation.outside import FolderMaps, FunctionMethod, MapFunction, different_sizes
from visionattn.evaluation.randomisation import rank_correlation, shuffled
from visionattn.maps import Method, methods_that_fit

RESAMPLES = 2_000
_SLOW = 16  # forward passes above which a method gets one image at a time
_CONTROLS = 3  # controls of one method, for the expected time
MIN_IMAGES = 10
"""Smallest number of images for a confidence interval. With fewer images the bootstrap interval is much too narrow: a
method could beat a control on three images that agree by chance."""
NOT_MEASURED = "not measured: heatmaps of a folder cannot be made again for a model with shuffled weights"
"""What the sign – means in a table."""

Row: TypeAlias = dict[str, str | float | list[str]]


class Estimate(NamedTuple):
    """A mean and its 95 % confidence interval. With fewer than `MIN_IMAGES` images both bounds are NaN."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return the mean and half the width of the interval, e.g. `.91±.02`; – if it was not measured."""
        if math.isnan(self.value):
            return "–"
        value = _short(self.value)
        return value if math.isnan(self.low) else f"{value}±{_short((self.high - self.low) / 2)}"


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """The metrics of every method and control on every image.

    `print(scores)` and a notebook show the table of metrics with their intervals and the verdict on each method.
    `pandas.DataFrame(scores.table())` makes a data frame.

    Confidence intervals are percentiles of the bootstrap over images. The interval of a difference is paired: both
    sides use the same resamples of the images. Each resample chooses its own best threshold for `iou`.

    Attributes:
        values: method or control → metric → (N,) values, one per image; `iou` is (N, T), one value per threshold.
            `shuffled` is NaN for heatmaps from a folder: they cannot be made again for another model.
        controls: method → names of the controls that the method is compared with.
        failed: method → the reason why it could not be scored.
        accuracy: fraction of the images that the model classifies correctly; None if the data has no labels.
        paths: paths of the images; empty if the data has none.
        seed: seed of the resamples.
        resamples: R, the number of resamples.
    """

    values: Mapping[str, Mapping[str, NDArray[np.float32]]]
    controls: Mapping[str, tuple[str, ...]]
    failed: Mapping[str, str]
    accuracy: float | None
    paths: tuple[str, ...]
    seed: int
    resamples: int = RESAMPLES

    @property
    def images(self) -> int:
        """The number of images, N."""
        return len(next(iter(next(iter(self.values.values())).values())))

    @property
    def decided(self) -> bool:
        """Whether there are at least `MIN_IMAGES` images. With fewer, no method counts as better than a control."""
        return self.images >= MIN_IMAGES

    @property
    def metrics(self) -> list[str]:
        """The metrics that the data allows, in the order of `METRICS`. Some need boxes or masks."""
        return [metric for metric in METRICS if metric in next(iter(self.values.values()))]

    def of_images(self, name: str, metric: str) -> NDArray[np.float32]:
        """Return the values of a method or control, (N,). `iou` is taken at the threshold that is best on average."""
        values = self.values[name][metric]
        return values if values.ndim == 1 else values[:, values.mean(0).argmax()]

    def estimate(self, name: str, metric: str) -> Estimate:
        """Return the mean of a method or control over the images, with its interval."""
        return self._interval(self._means(name, metric))

    def margin(self, method: str, control: str, metric: str) -> Estimate:
        """Return how much better a method is than a control, with the interval of this difference.

        A positive value means that the method is better, also for metrics where a lower value is better.
        """
        return self._interval(margin(metric, self._means(method, metric), self._means(control, metric)))

    def beats(self, method: str, metric: str) -> bool:
        """Return whether a method is better than each of its controls: the lower bound of each margin is above 0.

        The maps of a control do not depend on the model, so the metric `shuffled` of a control is 1. The lower the
        `shuffled` of a method, the more its maps depend on the model's weights.
        """
        return all(self.margin(method, control, metric).low > 0 for control in self.controls[method])

    def unbeaten(self, method: str) -> list[str]:
        """Return the metrics in which at least one control of a method is not beaten; an empty list is best.

        Metrics that were not measured are left out.
        """
        return [m for m in self.metrics if self.measured(method, m) and not self.beats(method, m)]

    def measured(self, name: str, metric: str) -> bool:
        """Return whether a metric was measured for a method or control; `shuffled` is not for a folder of heatmaps."""
        return not np.isnan(self.values[name][metric]).any()

    def table(self) -> list[Row]:
        """Return the rows of a table for `pandas.DataFrame`: one row per method, then one row per control.

        Each row has `name`, `kind` ("method" or "control") and three numbers for every metric: the mean under the
        metric's name, and the bounds of its interval under that name plus `_low` and `_high`. The row of a method also
        has `unbeaten`, a list of the metrics in which the method does not beat every control.
        """
        return [self._row(name) for name in self._names()]

    def to_dict(self) -> dict[str, object]:
        """Return the scores as plain data for `json.dumps`: the rows of `table` and the values of every image."""
        return {
            "images": self.images,
            "accuracy": self.accuracy,
            "seed": self.seed,
            "resamples": self.resamples,
            "controls": to_plain(self.controls),
            "failed": dict(self.failed),
            "table": to_plain(self.table()),
            "paths": list(self.paths),
            "values": {
                name: {m: self.of_images(name, m).tolist() for m in self.metrics if self.measured(name, m)}
                for name in self.values
            },
        }

    def __repr__(self) -> str:
        """Return the table of metrics with intervals, and the verdict, as text."""
        names = self._names()
        cells = {name: self._cells(name) for name in names}
        first = max(len(f"  {name}") for name in names)
        widths = [
            max(len(metric) + 2, *(len(cells[name][i]) for name in names)) for i, metric in enumerate(self.metrics)
        ]
        titles = " ".join(f"{f'{m} {_arrow(m)}':>{width}}" for m, width in zip(self.metrics, widths, strict=True))
        lines = [f"{'':{first}} {titles}".rstrip()]
        for name in names:
            row = " ".join(f"{cell:>{width}}" for cell, width in zip(cells[name], widths, strict=True))
            lines.append(f"{f'{self._mark(name):2}{name}':{first}} {row}".rstrip())
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        heads = "".join(f"<th>{metric} {_arrow(metric)}</th>" for metric in self.metrics)
        rows = []
        for name in self._names():
            cells = "".join(f"<td>{cell.rstrip()}</td>" for cell in self._cells(name))
            kind = "method" if name in self.controls else "control"
            rows.append(f"<tr><th>{self._mark(name)}{html.escape(name)}</th><td>{kind}</td>{cells}</tr>")
        notes = "<br>".join(map(html.escape, self._notes()))
        return f"<table><tr><th></th><th></th>{heads}</tr>{''.join(rows)}</table><p>{notes}</p>"

    def __getstate__(self) -> dict[str, object]:
        """Pickle without the cached weights of the resamples: they are large, and the seed gives the same weights."""
        return {name: value for name, value in vars(self).items() if name != "_weights"}

    def _names(self) -> list[str]:
        return [*self.controls, *(name for name in self.values if name not in self.controls)]

    def _row(self, name: str) -> Row:
        row: Row = {"name": name, "kind": "method" if name in self.controls else "control"}
        for metric in self.metrics:
            row[metric], row[f"{metric}_low"], row[f"{metric}_high"] = self.estimate(name, metric)
        if name in self.controls:
            row["unbeaten"] = self.unbeaten(name)
        return row

    def _cells(self, name: str) -> list[str]:
        """Return the text of each metric, with a cross if at least one control is not beaten."""
        unbeaten = self.unbeaten(name) if self.decided and name in self.controls else ()
        return [f"{self.estimate(name, metric)} {'✗' if metric in unbeaten else ' '}" for metric in self.metrics]

    def _mark(self, name: str) -> str:
        if not self.decided or name not in self.controls:
            return ""
        return "✗ " if self.unbeaten(name) else "✓ "

    def _notes(self) -> list[str]:
        """Return the lines below the table: how to read it, the accuracy, and the methods that failed."""
        if self.decided:
            note = (
                f"± is half of the 95 % interval over {self.images} images; "
                "✗ marks a metric in which a method does not beat each of its controls."
            )
        else:
            note = (
                f"A confidence interval needs at least {MIN_IMAGES} images; got {self.images}. "
                "Without intervals no method counts as better than a control."
            )
        if not all(self.measured(name, metric) for name in self.values for metric in self.metrics):
            note += f" – {NOT_MEASURED}."
        right = [] if self.accuracy is None else [f"The model's accuracy on these images is {self.accuracy:.3f}."]
        return [note, *right, *(f"{name} could not be scored: {reason}" for name, reason in self.failed.items())]

    def _means(self, name: str, metric: str) -> NDArray[np.floating]:
        """Return the mean over the images and over each resample of them, (1 + R,)."""
        means = self._weights @ self.values[name][metric]
        return means if means.ndim == 1 else means.max(1)

    @cached_property
    def _weights(self) -> NDArray[np.float32]:
        """The weight of each image in each mean, (1 + R, N). The first row weighs all images equally."""
        count, chunk = self.images, 50  # resamples at a time, so that the temporary arrays stay small
        random, weights = np.random.default_rng(self.seed), np.ones((1 + self.resamples, count), np.float32)
        for start in range(1, 1 + self.resamples, chunk):
            rows = weights[start : start + chunk]
            rows[:] = random.multinomial(count, np.full(count, 1 / count), len(rows))
        weights /= count
        return weights

    def _interval(self, means: NDArray[np.floating]) -> Estimate:
        low, high = np.percentile(means[1:], [2.5, 97.5]) if self.decided else (np.nan, np.nan)
        return Estimate(float(means[0]), float(low), float(high))


def _short(number: float) -> str:
    return f"{number:.2f}".removeprefix("0")


def _arrow(metric: str) -> str:
    return "↑" if METRICS[metric] > 0 else "↓"


def score(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    methods: Mapping[str, Method | FolderMaps | MapFunction] | None = None,
    *,
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
            (default: every method that fits the model, except the slow Score-CAM).
        steps: steps of deletion and insertion, ≥ 2.
        copies: copies of the model with shuffled weights, ≥ 1.
        batch_size: perturbed images in one forward pass.
        seed: seed of all random numbers, in [0, 2³²).
        advance: called with the number of images scored since the previous call. The number may be a fraction: each
            heatmap counts in proportion to its expected time.
        expect: called once, before the first heatmap, with the expected seconds for one image of each method and of
            `"controls"`. The estimate is the time of a measured forward pass times the number of passes, see
            `Method.passes`.

    Raises:
        UsageError: no method fits, the sizes of images differ, the keys of batches differ, a method has the name of a
            control, or an argument is out of range.
        DataError: there are no images, or the images or the model's output hold NaN or infinity.
    """
    if copies < 1 or steps < 2:
        raise UsageError(f"copies must be ≥ 1 and steps ≥ 2, got {copies} and {steps}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must be in [0, 2³²), got {seed}")
    sources: Mapping[str, Method | FolderMaps] | None = None
    if methods is not None:
        sources = {
            name: method if isinstance(method, (Method, FolderMaps)) else FunctionMethod(method)
            for name, method in methods.items()
        }
    model = unwrap(model)
    like = next(model.parameters(), torch.zeros(()))
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
    spent: dict[str, int] = {}  # method or controls → all forward passes for an image
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
            passes = {name: (1 + copies) * _passes(method, model, images_BCHW) for name, method in sources.items()}
            curves = 2 * (steps - 1)  # passes of the curves of one map
            spent = {**{name: count + curves for name, count in passes.items()}, "controls": _CONTROLS * curves}
            if expect:
                second = faster / 2 / len(images_BCHW)
                expect({name: count * second for name, count in spent.items()})
        left = float(len(images_BCHW))  # images of this batch that were not yet reported
        maps: dict[str, tuple[Tensor, Tensor]] = {}
        for name, method in sources.items():
            if name in failed:
                continue
            try:
                # slow methods get one image at a time, so that the progress can be reported
                size = 1 if passes[name] > _SLOW * (1 + copies) else len(images_BCHW)
                parts = []
                for part_BCHW, part_B in zip(images_BCHW.split(size), target_B.split(size), strict=True):
                    explained = (
                        _read(method, batch, model, images_BCHW)
                        if isinstance(method, FolderMaps)
                        else _explain(method, model, randoms, part_BCHW, part_B)
                    )
                    parts.append(explained)
                    if advance:
                        done = len(part_BCHW) * passes[name] / sum(spent.values())
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
        options: dict[str, int] = {"steps": steps, "batch_size": batch_size, "seed": seed + images}
        for name, (heatmaps_Bhw, shuffled_B) in maps.items():
            metrics = {
                "deletion": perturbation_curve(model, removal, heatmaps_Bhw, **options).auc,
                "insertion": perturbation_curve(model, restoration, heatmaps_Bhw, **options).auc,
                **_localisation(batch, heatmaps_Bhw, images_BCHW),
                "shuffled": shuffled_B,
            }
            measured.setdefault(name, []).append({metric: value.cpu() for metric, value in metrics.items()})
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
    """Return a method's heatmaps, and their similarity to the method's heatmaps of models with shuffled weights."""
    heatmaps_Bhw = method(model, images_BCHW, target=target_B).heatmaps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # maps of a model with shuffled weights are often constant
        others = [method(random, images_BCHW, target=target_B).heatmaps for random in randoms]
    similar = [rank_correlation(heatmaps_Bhw, other_Bhw).abs() for other_Bhw in others]
    return heatmaps_Bhw, torch.stack(similar).mean(0)


def _read(folder: FolderMaps, batch: Mapping[str, Any], model: nn.Module, images_BCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Return a folder's heatmaps, scaled as a method's are, and NaN for their similarity."""
    read = FunctionMethod(lambda *_: folder.of_batch(batch))
    return read(model, images_BCHW).heatmaps, torch.full((len(images_BCHW),), torch.nan)


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
