"""The base class of heatmap methods, the heatmaps that they return, and the choice of the output to explain.

Shapes: B batch, C channels, H rows and W columns of the image, h rows and w columns of the grid, K outputs.
"""

import inspect
import operator
import re
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, SupportsIndex, TypeAlias, TypeVar, get_args

import torch
from torch import Tensor, nn

from visionattn.capture import (
    Record,
    Site,
    StaleSurveyError,
    Survey,
    compact_state,
    forget,
    survey_images,
    undisturbed,
    unwrap,
)
from visionattn.data import encode_image
from visionattn.drawing import heatmap_sheet
from visionattn.errors import BlankMapWarning, DataError, UsageError, warn

Target: TypeAlias = int | Tensor | Callable[[Any], Tensor] | None  # a function gets the model's output, of any type

_Output = TypeVar("_Output")

Needs: TypeAlias = Literal["glimpses", "attention over positions", "gates over positions", "feature maps", "any model"]
Cost: TypeAlias = Literal[
    "a forward pass",
    "a forward and a backward pass",
    "a forward pass a channel",
    "a forward pass a mask",
    "many forward and backward passes",
]


_SHOWN = 8  # largest number of images whose peak `repr` shows


@dataclass(frozen=True, repr=False)
class Heatmaps:
    """Heatmaps of a batch of images, at the resolution of the model's grid.

    A notebook shows the heatmaps of the first 16 images as a picture; `print` shows the peaks of the first 8.

    Attributes:
        heatmaps: (B, h, w) float32 in [0, 1]. Each map spans the whole input of the model. Its smallest value is 0 and
            its largest 1; a constant map is 0 everywhere.
        raw: (B, h, w) float32, the map before it was scaled to [0, 1].
        output: the model's output, detached.
        target: (B,) int64, the output that is explained; None if the method explains no particular output.
        source: what the heatmaps show, e.g. `"gate of layer4.1"`.
        method: name of the method.
        boxes: (B, T, S, 4), the boxes that T glimpses covered at S scales, in order, xyxy in pixels of the model's
            input; None if the method is not `Gaze`.
    """

    heatmaps: Tensor
    raw: Tensor
    output: Any  # a user's model may return a value of any type
    target: Tensor | None
    source: str
    method: str
    boxes: Tensor | None = None

    def to_dict(self) -> dict[str, object]:
        """Return the result as plain data for `json.dumps`, without the model's output. Arrays are nested lists."""
        return {
            "method": self.method,
            "source": self.source,
            "target": None if self.target is None else self.target.tolist(),
            "heatmaps": self.heatmaps.tolist(),
            "raw": self.raw.tolist(),
            "boxes": None if self.boxes is None else self.boxes.tolist(),
        }

    def __repr__(self) -> str:
        lines = [f"Heatmaps({self.method} of {self.source}, heatmaps {tuple(self.heatmaps.shape)})"]
        targets = [None] * len(self.raw) if self.target is None else self.target.tolist()
        for number, (raw_hw, target) in enumerate(zip(self.raw[:_SHOWN], targets, strict=False)):
            output = "" if target is None else f"output {target}, "
            lines.append(f"  image {number}: {output}{describe_map(raw_hw)}")
        if len(self.raw) > _SHOWN:
            lines.append(f"  and {len(self.raw) - _SHOWN} more images")
        return "\n".join(lines)

    def _repr_png_(self) -> bytes:
        """Show the heatmaps in a notebook."""
        heatmaps_Bhw = self.heatmaps.float().cpu().numpy()
        return encode_image(heatmap_sheet(heatmaps_Bhw, f"{self.method} of {self.source}"), ".png")

    def __getstate__(self) -> dict[str, object]:
        return compact_state(self)


def describe_map(raw_hw: Tensor) -> str:
    """Return the place of a map's peak and the range of its values as text."""
    row, column = divmod(int(raw_hw.flatten().argmax()), raw_hw.shape[1])
    return f"peak at row {row}, column {column}; raw values {float(raw_hw.min()):.3g} to {float(raw_hw.max()):.3g}"


class Explanation(NamedTuple):
    """The result of `Method.explain`: `raw`, `output`, `target`, `source` and `boxes` of `Heatmaps`."""

    raw_Bhw: Tensor  # noqa: N815
    output: Any  # a user's model may return a value of any type
    target_B: Tensor | None  # noqa: N815
    source: str
    boxes_BTS4: Tensor | None = None  # noqa: N815


class Method(ABC):
    """A heatmap method: it turns a model and images into heatmaps.

    A call leaves the model unchanged: training flags, `requires_grad`, `.grad` and hooks. The model runs in evaluation
    mode. Methods work under `torch.inference_mode` and `torch.no_grad`, and on frozen parameters.
    """

    name: ClassVar[str]
    """Name of the method on the command line."""

    needs: ClassVar[Needs]
    """What a model must have for the method to fit."""

    cost: ClassVar[Cost]
    """The passes through the model that one batch of images costs."""

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        """Return whether the method fits a model, given the model's survey."""
        return True

    def passes(self, model: nn.Module, images_BCHW: Tensor) -> int:
        """Return about how many forward passes of an image its heatmap costs; a backward pass counts as two.

        Args:
            model: any vision model; unchanged afterwards.
            images_BCHW: an example of its input.
        """
        return 3 if getattr(self, "cost", "") == "a forward and a backward pass" else 1

    def __call__(self, model: nn.Module, images_BCHW: Tensor, *, target: Target = None) -> Heatmaps:
        """Explain the model's output for each image.

        Args:
            model: any vision model; unchanged afterwards.
            images_BCHW: images, normalised for the model.
            target: the output to explain: None for the highest, an index, a tensor with one index per image, or a
                function that takes the model's output and returns (B,) scores.

        Raises:
            UsageError: the method does not fit the model, or the target does not fit its output.
            DataError: the images or the weights hold NaN or infinity, or the batch is empty.
        """
        check_images(images_BCHW)
        with undisturbed(model) as bare:
            images_BCHW = images_BCHW.clone() if images_BCHW.is_inference() else images_BCHW.detach()
            try:
                explanation = self._explain(bare, images_BCHW, target)
            except StaleSurveyError:  # the model changed in a way that the cache of surveys does not notice
                forget(bare)
                explanation = self._explain(bare, images_BCHW, target)
            raw, output, target_B, source, boxes_BTS4 = explanation
            output = detach(output)
        raw = raw.detach().float()
        if not raw.isfinite().all():
            raise DataError(f"the {self.name} heatmap of {source} is not finite; {find_non_finite(bare)}")
        return Heatmaps(normalise(raw, self.name, source), raw, output, target_B, source, self.name, boxes_BTS4)

    def _explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        explanation = self.explain(model, images_BCHW, target)
        if len(explanation.raw_Bhw) != len(images_BCHW):
            raise StaleSurveyError(
                f"{explanation.source} gives {len(explanation.raw_Bhw)} heatmaps for {len(images_BCHW)} images"
            )
        return explanation

    @abstractmethod
    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        """Compute the raw maps.

        `__call__` has checked the images, turned gradients off, put the model into evaluation mode and frozen its
        parameters.
        """


def check_images(images_BCHW: Tensor) -> None:
    """Check that a batch of images can be explained.

    Raises:
        UsageError: the images are not (B, C, H, W), or not floating point.
        DataError: the batch is empty, or holds NaN or infinity.
    """
    if images_BCHW.ndim != 4:
        raise UsageError(
            f"images must be (B, C, H, W), got {tuple(images_BCHW.shape)}; for a single image pass image[None]"
        )
    if len(images_BCHW) == 0:
        raise DataError("the batch of images is empty; pass at least one image")
    if not images_BCHW.is_floating_point():
        raise UsageError(f"images must be normalised floating point, got {images_BCHW.dtype}")
    # NaN and infinity make the sum not finite; only then are all values checked, since the sum may also overflow
    if not images_BCHW.sum(dtype=torch.float32).isfinite() and not images_BCHW.isfinite().all():
        raise DataError("the images hold NaN or infinity; check how they were normalised")


def normalise(raw_Bhw: Tensor, method: str, source: str) -> Tensor:
    """Scale each map to [0, 1], and warn of constant maps, which become 0."""
    low = raw_Bhw.amin((1, 2), keepdim=True)
    span = raw_Bhw.amax((1, 2), keepdim=True) - low
    scale = raw_Bhw.abs().amax((1, 2), keepdim=True)
    flat = span <= 1e-6 * scale + torch.finfo(torch.float32).tiny
    if flat.any():
        zero = bool((scale[flat] == 0).all())
        warn(
            f"{int(flat.sum())} of {len(flat)} {method} heatmaps of {source} are {'zero' if zero else 'constant'} and "
            "show nothing; try another layer or target",
            BlankMapWarning,
        )
    return torch.where(flat, 0, (raw_Bhw - low) / torch.where(flat, 1, span))


def detach(output: _Output) -> _Output:
    """Return a model's output with every tensor in it detached."""
    detached: _Output = _detached(output)
    return detached


def _detached(output: Any) -> Any:  # a user's model may return a value of any type
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, dict):
        items = {key: _detached(value) for key, value in output.items()}
        return type(output)(**items) if type(output) is not dict else items
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(_detached, output))
    if isinstance(output, (tuple, list)):
        return type(output)(map(_detached, output))
    return output


def find_non_finite(model: nn.Module) -> str:
    """Return the end of an error message: the first weight or buffer with NaN or infinity; advice if there is none."""
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if parameter.is_floating_point() and not parameter.isfinite().all():
            return f"{name} holds NaN or infinity"
    return "the weights are finite, so an activation overflows: try float32"


def label_threshold(model: nn.Module) -> float | None:
    """Return the probability above which a label counts as found, or None if every image has exactly one class.

    It is the network's attribute `label_threshold`, which `tasks.MultiLabelClassification` sets: the outputs of such a
    network are independent labels.
    """
    threshold: float | None = getattr(unwrap(model), "label_threshold", None)
    return threshold


def probabilities_of(model: nn.Module, scores_BK: Tensor) -> Tensor:
    """Convert a model's scores to probabilities (B, K): sigmoid for independent labels or one score, else softmax."""
    if label_threshold(model) is None and scores_BK.shape[1] > 1:
        return scores_BK.softmax(1)
    return scores_BK.sigmoid()


def first_tensor(output: object, *, axes: int) -> Tensor | None:
    """Return the first tensor with this number of axes in a model's output; None if there is none.

    Args:
        output: a tensor, an object with `logits`, or a dict, tuple or list; in a dict, `logits` and `out` are tried
            first.
        axes: the number of axes.
    """
    candidates: list[object] = [output, getattr(output, "logits", None)]
    if isinstance(output, dict):
        candidates += [output.get("logits"), output.get("out"), *output.values()]
    elif isinstance(output, (tuple, list)):
        candidates += output
    tensors = (candidate for candidate in candidates if isinstance(candidate, Tensor))
    return next((tensor for tensor in tensors if tensor.ndim == axes), None)


def scores_of(output: object) -> Tensor:
    """Return the (B, K) scores in a model's output.

    Args:
        output: see `first_tensor`.

    Raises:
        UsageError: the output is a detector's, or has no 2-D tensor.
    """
    scores_BK = first_tensor(output, axes=2)
    if scores_BK is not None:
        return scores_BK
    if isinstance(output, list) and output and isinstance(output[0], dict) and "boxes" in output[0]:
        raise UsageError("a detector has no scores of the whole image; use odam, which explains each box")
    shapes = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise UsageError(
        f"the model's output ({shapes}) has no (B, K) scores to choose a class from; "
        "pass target=a function from the output to (B,) scores"
    )


def pick(output: object, target: Target) -> tuple[Tensor, Tensor | None]:
    """Return the scores to explain, (B,), and their indices, (B,) int64; None for the indices if target is a function.

    Raises:
        UsageError: the target is out of range, of a wrong type, or does not fit the batch.
    """
    if callable(target):
        score_B = target(output)
        if not isinstance(score_B, Tensor) or score_B.ndim != 1:
            raise UsageError(f"a target function must return (B,) scores, got {getattr(score_B, 'shape', score_B)}")
        return score_B, None
    scores_BK = scores_of(output)
    count = scores_BK.shape[1]
    if target is None:
        index_B = scores_BK.detach().argmax(1)
    elif isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex():
            raise UsageError(f"target must be int64 or another integer type, got {target.dtype}")
        if target.numel() not in (1, len(scores_BK)):
            raise UsageError(
                f"target holds {target.numel()} indices for {len(scores_BK)} images; pass one index, or one per image"
            )
        index_B = target.to(scores_BK.device, torch.long).reshape(-1).expand(len(scores_BK)).clone()
    elif isinstance(target, SupportsIndex):
        index_B = torch.full((len(scores_BK),), operator.index(target), device=scores_BK.device)
    else:
        raise UsageError(f"target must be an index, a tensor of indices, a function or None, got {target!r}")
    if ((index_B < 0) | (index_B >= count)).any():
        raise UsageError(f"target {index_B.tolist()} is out of range: the model has {count} outputs, 0 to {count - 1}")
    return scores_BK.gather(1, index_B[:, None])[:, 0], index_B


def methods() -> dict[str, type[Method]]:
    """Return every method in the public list of `visionattn.maps`: name → class, ordered by needs, cost and name."""
    package = sys.modules[__package__]
    # the list contains METHODS, which does not exist before this function has returned
    listed = [getattr(package, name, None) for name in package.__all__]
    public = [kind for kind in listed if isinstance(kind, type) and issubclass(kind, Method) and hasattr(kind, "name")]
    order = {text: number for number, text in enumerate((*get_args(Needs), *get_args(Cost)))}
    return {
        kind.name: kind for kind in sorted(public, key=lambda kind: (order[kind.needs], order[kind.cost], kind.name))
    }


def fitting(survey: Survey) -> str:
    """Return the names of the methods that fit a model, as the end of an error message."""
    names = [name for name, kind in methods().items() if kind.fits(survey)]
    return f" Methods that fit: {', '.join(names)}." if names else " No method fits."


def check_fuse(fuse: str) -> None:
    """Raise a UsageError unless `fuse` is mean, max or min."""
    if fuse not in ("mean", "max", "min"):
        raise UsageError(f"fuse must be mean, max or min, got {fuse!r}")


def fuse_heads(weights: Tensor, fuse: str, axis: int) -> Tensor:
    """Return the mean, maximum or minimum of the weights over the axis of heads."""
    if fuse == "mean":
        return weights.mean(axis)
    return weights.amax(axis) if fuse == "max" else weights.amin(axis)


def attention_source(record: Record | Site) -> str:
    """Return the `source` of heatmaps that show the attention of a module."""
    return f"attention of {record.name}"


def layers_source(survey: Survey, used: int) -> str:
    """Return how many of a model's layers of attention a method uses, as the `source` of its heatmaps."""
    count = len(survey.attention) + len(survey.unlabelled)
    return f"all {count} layers of attention" if used == count else f"{used} of {count} layers of attention"


def require_attention(method: str, model: nn.Module, images_BCHW: Tensor) -> Survey:
    """Return the survey of a model that attends over positions.

    Raises:
        UsageError: the model does not attend over positions; the message names the methods that fit.
    """
    survey = survey_images(model, images_BCHW)
    if not survey.attention:
        reasons = [f"{name}: {why}" for name, why in (survey.unlabelled | survey.other).items()][:2]
        because = f" ({'; '.join(reasons)})" if reasons else ""
        raise UsageError(
            f"{method} needs attention over positions; this {type(model).__name__} has none{because}.{fitting(survey)}"
        )
    return survey


class _Named(Protocol):
    name: ClassVar[str]


_Kind = TypeVar("_Kind", bound=_Named)


def at_layer(kind: type[_Kind], layer: int | str | None) -> _Kind:
    """Create a method from its class, for one layer.

    Args:
        kind: the class of the method, with an argument `layer` or without one.
        layer: name of a module, or its index among the modules that the method uses (an int or a string of digits);
            None for the default.

    Raises:
        UsageError: the method takes no layer, or takes only a name.
    """
    make: Callable[..., _Kind] = kind
    if layer is None:
        return make()
    parameters = inspect.signature(kind).parameters
    if "layer" not in parameters:
        raise UsageError(f"{kind.name} combines all layers and takes no layer; leave the layer out")
    if "int" in str(parameters["layer"].annotation):
        layer = int(layer) if re.fullmatch(r"-?\d+", str(layer)) else layer
    elif isinstance(layer, int):
        raise UsageError(f"{kind.name} takes the name of a layer, not its index {layer}")
    return make(layer=layer)
