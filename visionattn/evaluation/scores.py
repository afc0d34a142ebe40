"""The result of `score`: the metrics of methods and controls, with confidence intervals and verdicts.

Shapes: N images, R resamples, T thresholds.
"""

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visionattn.capture import to_plain
from visionattn.evaluation.controls import METRICS, margin

RESAMPLES = 2_000
MIN_IMAGES = 10
"""Smallest number of images for a confidence interval. With fewer images the bootstrap interval is much too narrow: a
method could beat a control on three images that agree by chance."""
NOT_MEASURED = (
    "not measured: a folder's heatmaps cannot be made again; a grid needs images of several classes, and a method that "
    "can explain them"
)
"""What the sign – means in a table."""
LEGEND = "no sign: beats every control in this metric; =: ties with a control; ✗: loses to a control"
"""What the signs after a number mean in a table."""

Outcome: TypeAlias = Literal["beats", "ties with", "loses to"]
Row: TypeAlias = dict[str, str | float | list[str]]


_NOT_WON: tuple[Outcome, ...] = ("ties with", "loses to")


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

    `print(scores)` and a notebook show the table of metrics with their intervals, and a verdict on each method.
    `pandas.DataFrame(scores.table())` makes a data frame.

    Confidence intervals are percentiles of the bootstrap over images. The interval of a difference is paired: both
    sides use the same resamples of the images. Each resample chooses its own best threshold for `iou`. A method beats a
    control in a metric if the whole interval of its advantage is above 0, loses to it if the whole interval is below 0,
    and ties with it otherwise.

    Attributes:
        values: method or control → metric → (N,) values, one per image; `iou` is (N, T), one value per threshold.
            NaN where a metric was not measured: `shuffled` and `grid` of heatmaps from a folder, which cannot be made
            again, and `grid` of an image if its batch has too few images of other classes.
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
        known = self._known(metric, name)
        return self._interval(self._means(name, metric, known), known.sum() >= MIN_IMAGES)

    def margin(self, method: str, control: str, metric: str) -> Estimate:
        """Return how much better a method is than a control, with the interval of this difference.

        A positive value means that the method is better, also for metrics where a lower value is better.
        """
        known = self._known(metric, method, control)  # the same images on both sides
        means = margin(metric, self._means(method, metric, known), self._means(control, metric, known))
        return self._interval(means, known.sum() >= MIN_IMAGES)

    def outcome(self, method: str, control: str, metric: str) -> Outcome | None:
        """Return how a method compares with a control in a metric; None if there are too few images, or no values."""
        _, low, high = self.margin(method, control, metric)
        if math.isnan(low):
            return None
        return "beats" if low > 0 else "loses to" if high < 0 else "ties with"

    def outcomes(self, method: str, metric: str) -> dict[Outcome, list[str]]:
        """Return the controls that a method beats, ties with and loses to in a metric: outcome → names of controls."""
        found: dict[Outcome, list[str]] = {"beats": [], "ties with": [], "loses to": []}
        for control in self.controls[method]:
            if outcome := self.outcome(method, control, metric):
                found[outcome].append(control)
        return found

    def verdict(self, method: str) -> str:
        """Return in which metrics a method beats, ties with or loses to which control, as a sentence.

        For example: "beats every control in deletion and energy; ties with centre in pointing; loses to edges 7×7 in
        iou". The sentence is empty if there are too few images for intervals.
        """
        by_metric = {metric: self.outcomes(method, metric) for metric in self.metrics}
        by_metric = {metric: found for metric, found in by_metric.items() if any(found.values())}
        parts = []
        won = [metric for metric, found in by_metric.items() if not (found["ties with"] or found["loses to"])]
        if won:
            every = len(won) == len(self.metrics) > 1
            parts.append(f"beats every control in {'every metric' if every else _listed(won)}")
        for relation in _NOT_WON:
            controls: dict[tuple[str, ...], list[str]] = {}  # controls → metrics
            for metric, found in by_metric.items():
                if found[relation]:
                    controls.setdefault(tuple(found[relation]), []).append(metric)
            parts += [f"{relation} {_listed(names)} in {_listed(metrics)}" for names, metrics in controls.items()]
        return "; ".join(parts)

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
        return not np.isnan(self.values[name][metric]).all()

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

    def sign(self, method: str, metric: str) -> str:
        """Return the sign of a method's metric in a table: ✗ if it loses to a control, = if it ties, else a space."""
        found = self.outcomes(method, metric)
        return "✗" if found["loses to"] else "=" if found["ties with"] else " "

    def cells(self, name: str) -> list[str]:
        """Return the text of each metric of a method or control: the estimate and the sign."""
        return [
            f"{self.estimate(name, metric)}{self.sign(name, metric) if name in self.controls else ' '}"
            for metric in self.metrics
        ]

    def verdicts(self) -> list[str]:
        """Return a line for each method, with its name and verdict; no lines if there are too few images."""
        return [f"{name} {self.verdict(name)}" for name in self.controls if self.verdict(name)]

    def __repr__(self) -> str:
        """Return the table of metrics with intervals, and the verdict, as text."""
        names = self._names()
        cells = {name: self.cells(name) for name in names}
        first = max(map(len, names))
        widths = [
            max(len(metric) + 2, *(len(cells[name][i]) for name in names)) for i, metric in enumerate(self.metrics)
        ]
        titles = " ".join(f"{f'{m} {_arrow(m)}':>{width}}" for m, width in zip(self.metrics, widths, strict=True))
        lines = [f"{'':{first}} {titles}".rstrip()]
        for name in names:
            row = " ".join(f"{cell:>{width}}" for cell, width in zip(cells[name], widths, strict=True))
            lines.append(f"{name:{first}} {row}".rstrip())
        return "\n".join([*lines, *self._notes()])

    def _repr_html_(self) -> str:
        """Show the table in a notebook."""
        heads = "".join(f"<th>{metric} {_arrow(metric)}</th>" for metric in self.metrics)
        rows = []
        for name in self._names():
            cells = "".join(f"<td>{cell.rstrip()}</td>" for cell in self.cells(name))
            kind = "method" if name in self.controls else "control"
            rows.append(f"<tr><th>{html.escape(name)}</th><td>{kind}</td>{cells}</tr>")
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
            row["unbeaten"], row["verdict"] = self.unbeaten(name), self.verdict(name)
        return row

    def _notes(self) -> list[str]:
        """Return the lines below the table: the verdicts, how to read it, the accuracy, and the methods that failed."""
        if self.decided:
            note = f"± is half of the 95 % interval over {self.images} images; {LEGEND}."
        else:
            note = (
                f"A confidence interval needs at least {MIN_IMAGES} images; got {self.images}. "
                "Without intervals no method counts as better than a control."
            )
        if not all(self.measured(name, metric) for name in self.values for metric in self.metrics):
            note += f" – {NOT_MEASURED}."
        right = [] if self.accuracy is None else [f"The model's accuracy on these images is {self.accuracy:.3f}."]
        return [
            *self.verdicts(),
            note,
            *right,
            *(f"{name} could not be scored: {reason}" for name, reason in self.failed.items()),
        ]

    def _known(self, metric: str, *names: str) -> NDArray[np.bool_]:
        """Return which images have a value for each of the methods and controls, (N,)."""
        known = [~np.isnan(self.values[name][metric]).reshape(self.images, -1)[:, 0] for name in names]
        return np.logical_and.reduce(known)

    def _means(self, name: str, metric: str, known: NDArray[np.bool_]) -> NDArray[np.floating]:
        """Return the mean over the images in `known` and over each resample of them, (1 + R,)."""
        values = self.values[name][metric]
        if known.all():
            means = self._weights @ values
        else:
            values = np.where(known, values, 0)  # of the metrics that images can lack, each image has one value
            with np.errstate(invalid="ignore"):  # a resample without any value is NaN
                means = self._weights @ values / (self._weights @ known.astype(np.float32))
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

    def _interval(self, means: NDArray[np.floating], enough: bool) -> Estimate:
        low, high = np.nanpercentile(means[1:], [2.5, 97.5]) if enough else (np.nan, np.nan)
        return Estimate(float(means[0]), float(low), float(high))


def _listed(names: Sequence[str]) -> str:
    """Return names as a list in a sentence: a, b and c."""
    return " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _short(number: float) -> str:
    return f"{number:.2f}".removeprefix("0")


def _arrow(metric: str) -> str:
    return "↑" if METRICS[metric] > 0 else "↓"
