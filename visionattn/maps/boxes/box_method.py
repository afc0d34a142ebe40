"""Base of the heatmap methods for detectors: one heatmap for every box.

A detector is any module that returns a list with one dict per image: `boxes` (N, 4) xyxy in pixels of the input,
`scores` (N,) and `labels` (N,), in descending order of the scores. The detectors of `visionattn.models` and of
torchvision are such modules.

Shapes: B batch, N boxes of an image, C channels, H × W the input, h × w a map; Q queries, M heads, L maps, K points.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from visionattn.capture import compact_state, undisturbed
from visionattn.data import encode_image
from visionattn.drawing import Tile, heat_of_range, sheet
from visionattn.errors import DataError, UsageError
from visionattn.maps.method import check_images, describe_map, detach, find_non_finite, normalise

SURE = 0.3
"""Default of `min_score`, the lowest score of a box to explain."""

_SHOWN, _DRAWN = 8, 16  # largest number of boxes to print, and of heatmaps to draw


@dataclass(frozen=True, repr=False)
class BoxHeatmaps:
    """The boxes that a detector finds in one image, and a heatmap of each.

    `print` shows each box with its peak, and a notebook draws the heatmaps.

    Attributes:
        boxes: (N, 4) xyxy in pixels of the input, in descending order of the scores.
        scores: (N,) in [0, 1].
        labels: (N,) int64.
        heatmaps: (N, h, w) float32 in [0, 1], each spanning the whole input; a constant map is 0 everywhere.
        raw: (N, h, w) float32, the map before it was scaled to [0, 1].
        source: what the heatmaps show, e.g. `"score by features"`.
        method: name of the method.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    heatmaps: Tensor
    raw: Tensor
    source: str
    method: str

    def to_dict(self) -> dict[str, object]:
        """Return the result as plain data for `json.dumps`. Arrays are nested lists."""
        return {
            "method": self.method,
            "source": self.source,
            "boxes": self.boxes.tolist(),
            "scores": self.scores.tolist(),
            "labels": self.labels.tolist(),
            "heatmaps": self.heatmaps.tolist(),
            "raw": self.raw.tolist(),
        }

    def __repr__(self) -> str:
        count = len(self.boxes)
        lines = [f"BoxHeatmaps({self.method} of {self.source}, {count} box{'' if count == 1 else 'es'})"]
        for box, score, label, raw_hw in list(zip(self.boxes, self.scores, self.labels, self.raw, strict=True))[
            :_SHOWN
        ]:
            corners = ", ".join(f"{edge:.0f}" for edge in box.tolist())
            lines.append(f"  label {int(label)}, score {float(score):.2f}, box ({corners}): {describe_map(raw_hw)}")
        if count > _SHOWN:
            lines.append(f"  and {count - _SHOWN} more boxes")
        return "\n".join(lines)

    def _repr_png_(self) -> bytes | None:
        """Show the heatmaps of the first boxes in a notebook; None without boxes, so that the text is shown."""
        if not len(self.heatmaps):
            return None
        tiles = [
            Tile(heat_of_range(map_hw.float().cpu().numpy()), [f"label {int(label)}, {float(score):.2f}"])
            for map_hw, label, score in list(zip(self.heatmaps, self.labels, self.scores, strict=True))[:_DRAWN]
        ]
        return encode_image(sheet(tiles, title=f"{self.method} of {self.source}", columns=4, width=180), ".png")

    def __getstate__(self) -> dict[str, object]:
        return compact_state(self)


class BoxMethod(ABC):
    """A heatmap method for detectors: it turns a detector and images into a heatmap of every box.

    Like a `Method`, a call leaves the model unchanged, and works under `torch.inference_mode` and `torch.no_grad`.
    """

    name: ClassVar[str]
    """Name of the method on the command line."""

    def __call__(
        self, detector: nn.Module, images_BCHW: Tensor, *, max_boxes: int = 10, min_score: float = SURE
    ) -> list[BoxHeatmaps]:
        """Explain the boxes with the highest scores in each image.

        Args:
            detector: a detector, as the docstring of this module defines it.
            images_BCHW: images, normalised for the detector.
            max_boxes: largest number of boxes to explain in each image, ≥ 1.
            min_score: lowest score of a box to explain.

        Returns:
            One `BoxHeatmaps` per image.

        Raises:
            UsageError: the model is not a detector, or the method does not fit it.
            DataError: the images or the weights hold NaN or infinity, or the batch is empty.
        """
        check_images(images_BCHW)
        if max_boxes < 1:
            raise UsageError(f"max_boxes must be ≥ 1, got {max_boxes}")
        with undisturbed(detector) as bare:
            images_BCHW = images_BCHW.clone() if images_BCHW.is_inference() else images_BCHW.detach()
            detections, raws, source = self.explain(bare, images_BCHW, max_boxes, min_score)
        maps = []
        for detected, raw_Nhw in zip(detections, raws, strict=True):
            raw_Nhw = raw_Nhw.detach().float()
            if not raw_Nhw.isfinite().all():
                raise DataError(f"a {self.name} heatmap of {source} is not finite; {find_non_finite(bare)}")
            heat_Nhw = normalise(raw_Nhw, self.name, source) if len(raw_Nhw) else raw_Nhw
            boxes, scores, labels = (detach(detected[key]) for key in ("boxes", "scores", "labels"))
            maps.append(BoxHeatmaps(boxes, scores, labels, heat_Nhw, raw_Nhw, source, self.name))
        return maps

    @abstractmethod
    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        """Return the detections of each image, their raw maps (N, h, w), and what the maps show."""


def detect(model: nn.Module, images_BCHW: Tensor) -> list[dict[str, Tensor]]:
    """Run a detector on images, and return its detections: one dict per image (see the docstring of this module).

    Raises:
        UsageError: the model does not return a list of detections.
    """
    takes_list = type(model).__module__.startswith("torchvision.models.detection")
    output = model(list(images_BCHW) if takes_list else images_BCHW)
    keys = {"boxes", "scores", "labels"}
    if not isinstance(output, list) or not all(isinstance(item, dict) and keys <= item.keys() for item in output):
        raise UsageError(
            f"this {type(model).__name__} is not a detector: a detector returns a list of dicts with boxes, scores and "
            "labels"
        )
    return output


def best_boxes(detected: dict[str, Tensor], max_boxes: int, min_score: float) -> dict[str, Tensor]:
    """Return the detections with a score of at least `min_score`: at most `max_boxes`, the highest scores first."""
    count = min(max_boxes, int((detected["scores"].detach() >= min_score).sum()))
    return {name: value[:count] for name, value in detected.items()}
