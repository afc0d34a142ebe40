"""Can these maps be believed? Methods and controls, scored on the same images, with intervals.

Shapes: N images in all, B of a batch, C channels, H × W pixels, R resamples, T thresholds.
"""

import html
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.capture.running import unwrap
from visionattn.errors import DataError, MapWarning, UsageError
from visionattn.evaluation.controls import FIGURES, controls_of, lead
from visionattn.evaluation.faithfulness import STEPS, deleting, follow, inserting
from visionattn.evaluation.localisation import energy, hit_share, inside, overlap
from visionattn.evaluation.randomisation import rank_correlation, shuffled
from visionattn.maps.method import Method
from visionattn.maps.selection import methods_that_fit

RESAMPLES = 2_000
FEWEST = 10
"""Images for an interval: the bootstrap's is much too narrow with fewer (three that agree by chance would pass)."""


class Estimate(NamedTuple):
    """A mean and its 95 % interval; of fewer than `FEWEST` images there is none, and the bounds are NaN."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`.91±.02`, half of the interval after the mean"""
        value = _short(self.value)
        return value if math.isnan(self.low) else f"{value}±{_short((self.high - self.low) / 2)}"


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """Figures of every image, by every method and control.

    The intervals are percentiles of the bootstrap over images; those of a difference are paired, image by image. The
    threshold of `iou` is chosen anew in each resample.

    Attributes:
        values: method or control → figure → (N,) of the images; `iou` (N, T) at each threshold.
        controls: method → the controls that it is held against.
        failed: method → why it could not be scored.
        accuracy: share of the images that the model names right; None where the data has no labels.
        paths: of the images, where the data has them.
        seed: of the resamples.
        resamples: R.
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
        """N"""
        return len(next(iter(next(iter(self.values.values())).values())))

    @property
    def decided(self) -> bool:
        """Whether there are images enough for intervals; without them no method beats a control."""
        return self.images >= FEWEST

    @property
    def figures(self) -> list[str]:
        """Those that these images allow, in the order of `FIGURES`."""
        return [figure for figure in FIGURES if figure in next(iter(self.values.values()))]

    def of_images(self, name: str, figure: str) -> NDArray[np.float32]:
        """(N,) of a method or control; `iou` at the threshold that is best for all images together."""
        values = self.values[name][figure]
        return values if values.ndim == 1 else values[:, values.mean(0).argmax()]

    def estimate(self, name: str, figure: str) -> Estimate:
        """The mean of a method or control over the images."""
        return self._interval(self._means(name, figure))

    def lead(self, method: str, control: str, figure: str) -> Estimate:
        """By how much a method is better than a control: positive is better, also where lower is."""
        return self._interval(lead(figure, self._means(method, figure), self._means(control, figure)))

    def beats(self, method: str, figure: str) -> bool:
        """Whether a method is better than each of its controls, by the lower bound of its lead.

        The maps of a control do not depend on the model, so its `shuffled` is 1: beating it says that a map depends on
        the weights at all, and only the figure itself how much.
        """
        return all(self.lead(method, control, figure).low > 0 for control in self.controls[method])

    def unbeaten(self, method: str) -> list[str]:
        """The verdict: figures in which a method does not beat the controls; none is good."""
        return [figure for figure in self.figures if not self.beats(method, figure)]

    def table(self) -> list[dict[str, Any]]:
        """A row a method, then a row a control: `name`, `kind`, an `Estimate` a figure, and of a method `unbeaten`."""
        methods = [
            {"name": name, "kind": "method", **self._estimates(name), "unbeaten": self.unbeaten(name)}
            for name in self.controls
        ]
        controls = [
            {"name": name, "kind": "control", **self._estimates(name)}
            for name in self.values
            if name not in self.controls
        ]
        return methods + controls

    def __repr__(self) -> str:
        return f"Scores({', '.join(self.values)}: {', '.join(self.figures)} of {self.images} images)"

    def _repr_html_(self) -> str:
        """A notebook shows the table."""
        heads = "".join(f"<th>{figure} {'↑' if FIGURES[figure] > 0 else '↓'}</th>" for figure in self.figures)
        rows = []
        for row in self.table():
            unbeaten = row.get("unbeaten", ()) if self.decided else ()
            mark = ("✗ " if unbeaten else "✓ ") if self.decided and row["kind"] == "method" else ""
            cells = "".join(f"<td>{row[figure]}{' ✗' if figure in unbeaten else ''}</td>" for figure in self.figures)
            rows.append(f"<tr><th>{mark}{html.escape(row['name'])}</th><td>{row['kind']}</td>{cells}</tr>")
        note = f"± half of the 95 % interval over {self.images} images; ✗ does not beat each of its controls"
        if not self.decided:
            note = f"{self.images} of {FEWEST} images that an interval takes, so nothing can be said to beat a control"
        right = "" if self.accuracy is None else f"; the model is right on {self.accuracy:.3f}"
        return f"<table><tr><th></th><th></th>{heads}</tr>{''.join(rows)}</table><p>{note}{right}</p>"

    def _estimates(self, name: str) -> dict[str, Estimate]:
        return {figure: self.estimate(name, figure) for figure in self.figures}

    def _means(self, name: str, figure: str) -> NDArray[np.floating]:
        """(1 + R,): the mean over the images, and over each resample of them."""
        means = self._weights @ self.values[name][figure]
        return means if means.ndim == 1 else means.max(1)

    @cached_property
    def _weights(self) -> NDArray[np.float32]:
        """(1 + R, N): how often each image is drawn, as a share; at first each once."""
        count, some = self.images, 50  # at a time, so that many images need no more memory than the result
        random, weights = np.random.default_rng(self.seed), np.ones((1 + self.resamples, count), np.float32)
        for start in range(1, 1 + self.resamples, some):
            rows = weights[start : start + some]
            rows[:] = random.multinomial(count, np.full(count, 1 / count), len(rows))
        weights /= count
        return weights

    def _interval(self, means: NDArray[np.floating]) -> Estimate:
        low, high = np.percentile(means[1:], [2.5, 97.5]) if self.decided else (np.nan, np.nan)
        return Estimate(float(means[0]), float(low), float(high))


def _short(number: float) -> str:
    return f"{number:.2f}".removeprefix("0")


def score(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    methods: Mapping[str, Method] | None = None,
    *,
    steps: int = STEPS,
    copies: int = 3,
    batch_size: int = 32,
    seed: int = 0,
    advance: Callable[[float], None] | None = None,
) -> Scores:
    """Score methods, and the controls that they must beat, on the same images.

    Every map explains what the model says of the whole image, right or wrong. Controls: a centre Gaussian, and on each
    method's grid a random map and an edge detector.

    Args:
        model: any vision model; it is left as it was.
        batches: dicts with `image` (B, C, H, W), all of one size, and where they are known `box` (B, 4) xyxy in pixels,
            `mask` (B, H, W), `label` (B,) and `path`.
        methods: name → method; by default all that fit the model but Score-CAM, which takes a forward pass a channel.
        steps: of deletion and insertion.
        copies: of the model, with shuffled weights.
        batch_size: changed images in one forward pass.
        seed: of all that is drawn.
        advance: called with the number of images that were done since, in fractions.

    Raises:
        UsageError: no method fits, the sizes of images differ, or only some batches have boxes or masks.
        DataError: there are no images, or the images or the model's output hold NaN or infinity.
    """
    if copies < 1 or steps < 2:
        raise UsageError(f"copies must be ≥ 1 and steps ≥ 2, got {copies} and {steps}")
    if not 0 <= seed < 2**32:
        raise UsageError(f"seed must be in [0, 2³²), got {seed}")
    model = unwrap(model)
    like = next(model.parameters(), torch.zeros(()))
    randoms = [shuffled(model, seed=seed + number) for number in range(copies)]
    found: dict[str, list[dict[str, Tensor]]] = {}  # method or control → figures of each batch
    failed: dict[str, Exception] = {}
    controls: dict[str, tuple[str, ...]] = {}
    right: list[Tensor] = []
    paths: list[str] = []
    kind, images = None, 0
    for batch in batches:
        images_BCHW = batch["image"].to(like.device, like.dtype)
        kind = _same_kind(batch, kind)
        removal = deleting(model, images_BCHW)
        target_B = removal.target
        assert isinstance(target_B, Tensor)
        restoration = inserting(model, images_BCHW, target=target_B)
        if methods is None:
            methods = methods_that_fit(model, images_BCHW)
        maps: dict[str, tuple[Tensor, Tensor]] = {}
        for name, method in methods.items():
            if name in failed:
                continue
            try:
                maps[name] = _explain(method, model, randoms, images_BCHW, target_B)
            except (UsageError, DataError) as error:
                failed[name] = error
        if not maps:
            raise next(iter(failed.values()), UsageError("there is no method to score"))
        against = {name: controls_of(maps[name][0], seed=seed) for name in maps}
        controls = {name: tuple(some) for name, some in against.items()}
        for name, control in {name: control for some in against.values() for name, control in some.items()}.items():
            if name in methods:
                raise UsageError(f"{name!r} is the name of a control; give the method another")
            # it does not look at the model, so it is the same with any weights
            maps[name] = control(model, images_BCHW).heatmaps, torch.ones(len(images_BCHW))
        way: dict[str, int] = {"steps": steps, "batch_size": batch_size, "seed": seed + images}
        for name, (heatmaps_Bhw, shuffled_B) in maps.items():
            figures = {
                "deletion": follow(model, removal, heatmaps_Bhw, **way).auc,
                "insertion": follow(model, restoration, heatmaps_Bhw, **way).auc,
                **_localisation(batch, heatmaps_Bhw, images_BCHW),
                "shuffled": shuffled_B,
            }
            found.setdefault(name, []).append({figure: value.cpu() for figure, value in figures.items()})
            if advance:
                advance(len(images_BCHW) / len(maps))
        if "label" in batch:
            right.append(batch["label"].to(target_B.device) == target_B)
        paths += batch.get("path", ())
        images += len(images_BCHW)
    if not images:
        raise DataError("there are no images to score")
    kept = [*controls, *dict.fromkeys(name for some in controls.values() for name in some)]
    return Scores(
        values={
            name: {figure: torch.cat([part[figure] for part in found[name]]).numpy() for figure in found[name][0]}
            for name in kept
        },
        controls=controls,
        failed={name: str(error) for name, error in failed.items()},
        accuracy=float(torch.cat(right).float().mean()) if right else None,
        paths=tuple(paths),
        seed=seed,
    )


def _explain(
    method: Method, model: nn.Module, randoms: Sequence[nn.Module], images_BCHW: Tensor, target_B: Tensor
) -> tuple[Tensor, Tensor]:
    """The heatmaps of a method, and how near they are to those of models with shuffled weights."""
    heatmaps_Bhw = method(model, images_BCHW, target=target_B).heatmaps
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # a model without its weights may show nothing
        others = [method(random, images_BCHW, target=target_B).heatmaps for random in randoms]
    near = [rank_correlation(heatmaps_Bhw, other_Bhw).abs() for other_Bhw in others]
    return heatmaps_Bhw, torch.stack(near).mean(0)


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


def _same_kind(batch: Mapping[str, Any], before: Any) -> Any:
    """What all batches must have in common: the size of the images, and what is known of them."""
    kind = tuple(batch["image"].shape[1:]), {"box", "mask", "label"} & batch.keys()
    if before is not None and kind != before:
        now, then = (
            f"images of {shape} with {', '.join(sorted(known)) or 'nothing'}" for shape, known in (kind, before)
        )
        raise UsageError(f"batches differ: {now} after {then}")
    return kind
