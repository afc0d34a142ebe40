"""What every method shares: the heatmaps it returns, the class it explains, and the care it takes of the model.

Shapes: B batch, C channels, H rows and W columns of the image, h rows and w columns of the grid, K outputs.
"""

import inspect
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, SupportsIndex, TypeAlias

import torch
from torch import Tensor, nn

from visionattn.capture.records import Record
from visionattn.capture.running import look, undisturbed
from visionattn.capture.survey import Survey
from visionattn.capture.token_layout import Site
from visionattn.data.decode import encode_image
from visionattn.drawing.sheets import heatmap_sheet
from visionattn.errors import DataError, UsageError, warn
from visionattn.maps.fitting import fitting

Target: TypeAlias = "int | Tensor | Callable[[Any], Tensor] | None"


@dataclass(frozen=True, repr=False)
class Maps:
    """Heatmaps of a batch of images, at the resolution of the model's grid.

    Attributes:
        heatmaps: (B, h, w) float32 in [0, 1], each spanning the whole input of the model; every image's smallest value
            is 0 and its largest 1, unless the map is constant: then all are 0.
        raw: (B, h, w) float32, the same before it was brought to [0, 1].
        output: what the model returned, detached.
        target: (B,) int64, the output that is explained; None where the method explains no output in particular.
        source: what is shown, e.g. `"gate of layer4.1"`.
        method: name of the method.
        boxes: (B, T, S, 4), what T glimpses covered at S scales, in order: xyxy in pixels of the model's input; None
            where the model takes none, or the method is another.
    """

    heatmaps: Tensor
    raw: Tensor
    output: Any
    target: Tensor | None
    source: str
    method: str
    boxes: Tensor | None = None

    def __repr__(self) -> str:
        return f"Maps({self.method} of {self.source}, heatmaps {tuple(self.heatmaps.shape)})"

    def _repr_png_(self) -> bytes:
        """A notebook shows the heatmaps."""
        heatmaps_Bhw = self.heatmaps.float().cpu().numpy()
        return encode_image(heatmap_sheet(heatmaps_Bhw, f"{self.method} of {self.source}"), ".png")


class Explanation(NamedTuple):
    """What a method found: raw (B, h, w), the model's output, the target, what is shown, and the boxes of glimpses."""

    raw_Bhw: Tensor  # noqa: N815
    output: Any
    target_B: Tensor | None  # noqa: N815
    source: str
    boxes_BTS4: Tensor | None = None  # noqa: N815


class Method(ABC):
    """Turns a model and images into heatmaps.

    Calling a method leaves the model as it was: training flags, `requires_grad`, `.grad`, hooks. The model runs in
    evaluation mode. It works under `torch.inference_mode` and `torch.no_grad`, and on frozen parameters.
    """

    name: ClassVar[str]
    """As the command line spells it."""

    def __call__(self, model: nn.Module, images_BCHW: Tensor, *, target: Target = None) -> Maps:
        """Explain what the model sees in each image.

        Args:
            model: any vision model.
            images_BCHW: normalised as the model wants it.
            target: the output to explain: None for the highest, an index, one index an image, or a function that takes
                the model's output and returns (B,) scores.

        Raises:
            UsageError: the method does not fit the model, or the target does not fit its output.
            DataError: the images or the weights hold NaN or infinity, or the batch is empty.
        """
        check_images(images_BCHW)
        with undisturbed(model) as bare:
            images_BCHW = images_BCHW.clone() if images_BCHW.is_inference() else images_BCHW.detach()
            raw, output, target_B, source, boxes_BTS4 = self.explain(bare, images_BCHW, target)
            output = detach(output)
        raw = raw.detach().float()
        if not raw.isfinite().all():
            raise DataError(f"the {self.name} heatmap of {source} is not finite; {culprit(bare)}")
        return Maps(stretch(raw, self.name, source), raw, output, target_B, source, self.name, boxes_BTS4)

    @abstractmethod
    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        """Do it; gradients are off, the model is in evaluation mode and its parameters do not require gradients."""


def check_images(images_BCHW: Tensor) -> None:
    """Raise where a batch of images cannot be explained."""
    if images_BCHW.ndim != 4:
        raise UsageError(
            f"images must be (B, C, H, W), got {tuple(images_BCHW.shape)}; for a single image pass image[None]"
        )
    if len(images_BCHW) == 0:
        raise DataError("the batch of images is empty; pass at least one image")
    if not images_BCHW.is_floating_point():
        raise UsageError(f"images must be normalised floating point, got {images_BCHW.dtype}")
    # a sum is not finite where a value is not; it is quicker, and settles it but for sums that overflow
    if not images_BCHW.sum(dtype=torch.float32).isfinite() and not images_BCHW.isfinite().all():
        raise DataError("the images hold NaN or infinity; look at how they were normalised")


def stretch(raw_Bhw: Tensor, method: str, source: str) -> Tensor:
    """Bring each map to [0, 1]; warn of those that are constant."""
    low = raw_Bhw.amin((1, 2), keepdim=True)
    span = raw_Bhw.amax((1, 2), keepdim=True) - low
    scale = raw_Bhw.abs().amax((1, 2), keepdim=True)
    flat = span <= 1e-6 * scale + torch.finfo(torch.float32).tiny
    if flat.any():
        zero = bool((scale[flat] == 0).all())
        warn(
            f"{int(flat.sum())} of {len(flat)} {method} heatmaps of {source} are {'zero' if zero else 'constant'} and "
            "show nothing; try another layer or target"
        )
    return torch.where(flat, 0, (raw_Bhw - low) / torch.where(flat, 1, span))


def detach(output: Any) -> Any:
    """Detach every tensor in a model's output."""
    if isinstance(output, Tensor):
        return output.detach()
    if isinstance(output, dict):
        items = {key: detach(value) for key, value in output.items()}
        return type(output)(**items) if type(output) is not dict else items
    if isinstance(output, tuple) and hasattr(output, "_fields"):
        return type(output)(*map(detach, output))
    if isinstance(output, (tuple, list)):
        return type(output)(map(detach, output))
    return output


def culprit(model: nn.Module) -> str:
    """Say which weights are not finite, as the end of an error message."""
    for name, parameter in (*model.named_parameters(), *model.named_buffers()):
        if parameter.is_floating_point() and not parameter.isfinite().all():
            return f"{name} holds NaN or infinity"
    return "the weights are finite, so an activation overflows: try float32"


def scores_of(output: Any) -> Tensor:
    """Find the (B, K) scores in what a model returned: a tensor, or the first 2-D one in an object, dict or tuple."""
    candidates: list[Any] = [output, getattr(output, "logits", None)]
    if isinstance(output, dict):
        candidates += [output.get("logits"), output.get("out"), *output.values()]
    elif isinstance(output, (tuple, list)):
        candidates += output
    for candidate in candidates:
        if isinstance(candidate, Tensor) and candidate.ndim == 2:
            return candidate
    if isinstance(output, list) and output and isinstance(output[0], dict) and "boxes" in output[0]:
        raise UsageError("a detector has no scores of the whole image; odam shows the evidence of each box")
    shapes = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    raise UsageError(
        f"the model's output ({shapes}) has no (B, K) scores to choose a class from; "
        "pass target=a function from the output to (B,) scores"
    )


def pick(output: Any, target: Target) -> tuple[Tensor, Tensor | None]:
    """Choose what to explain: (B,) scores, and (B,) indices where the target is an index."""
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
            raise UsageError(f"target holds {target.numel()} indices for {len(scores_BK)} images")
        index_B = target.to(scores_BK.device, torch.long).reshape(-1).expand(len(scores_BK)).clone()
    elif isinstance(target, SupportsIndex):
        index_B = torch.full((len(scores_BK),), operator.index(target), device=scores_BK.device)
    else:
        raise UsageError(f"target must be an index, a tensor of them, a function or None, got {target!r}")
    if ((index_B < 0) | (index_B >= count)).any():
        raise UsageError(f"target {index_B.tolist()} is out of range: the model has {count} outputs, 0 to {count - 1}")
    return scores_BK.gather(1, index_B[:, None])[:, 0], index_B


def check_fuse(fuse: str) -> None:
    if fuse not in ("mean", "max", "min"):
        raise UsageError(f"fuse must be mean, max or min, got {fuse!r}")


def fuse_heads(weights: Tensor, fuse: str, axis: int) -> Tensor:
    """Fuse heads by their mean, max or min."""
    if fuse == "mean":
        return weights.mean(axis)
    return weights.amax(axis) if fuse == "max" else weights.amin(axis)


def attention_source(record: Record | Site) -> str:
    return f"attention of {record.name}"


def attending(method: str, model: nn.Module, images_BCHW: Tensor) -> Survey:
    """What a survey finds in a model that attends over positions.

    Raises:
        UsageError: there are none; the message names methods that fit.
    """
    found = look(model, images_BCHW)
    if not found.attention:
        reasons = [f"{name}: {why}" for name, why in (found.unlabelled | found.other).items()][:2]
        because = f" ({'; '.join(reasons)})" if reasons else ""
        raise UsageError(
            f"{method} needs attention over positions; this {type(model).__name__} has none{because}."
            f"{fitting(model, images_BCHW)}"
        )
    return found


def at_layer(kind: Any, layer: int | str | None) -> Any:
    """A method of some kind at a layer, as `method_of` takes it."""
    if layer is None:
        return kind()
    parameters = inspect.signature(kind).parameters
    if "layer" not in parameters:
        raise UsageError(f"{kind.name} combines all layers and takes no layer")
    if "int" in str(parameters["layer"].annotation):
        layer = int(layer) if re.fullmatch(r"-?\d+", str(layer)) else layer
    elif isinstance(layer, int):
        raise UsageError(f"{kind.name} takes the name of a layer, not its place {layer}")
    return kind(layer=layer)
