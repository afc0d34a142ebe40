"""Methods for whole images used for boxes, and methods for boxes used for whole images.

Shapes: B batch, N boxes of an image, h × w a map.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from visionattn.errors import UsageError
from visionattn.maps.boxes.box_method import SURE, BoxMethod, best_boxes, detect
from visionattn.maps.method import Heatmaps, Method, Target
from visionattn.maps.methods.raw import RawAttention


class SameForAllBoxes(BoxMethod):
    """A method's heatmap of the whole image, repeated for every box, e.g. for gates, which explain no single output.

    Args:
        method: a method for whole images, e.g. `Gate`.

    Raises:
        UsageError: the method is `RawAttention` without a query; `BoxAttention` shows the attention of a box's tokens.
    """

    name = "whole"

    def __init__(self, method: Method) -> None:
        if isinstance(method, RawAttention) and method.query is None:
            raise UsageError("raw attention of the whole image is the same for all boxes; use BoxAttention instead")
        self.method = method

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        detections = [best_boxes(detected, max_boxes, min_score) for detected in detect(model, images_BCHW)]
        maps = self.method(model, images_BCHW)
        raws = [
            raw_hw.expand(len(detected["scores"]), -1, -1)
            for raw_hw, detected in zip(maps.raw, detections, strict=True)
        ]
        return detections, raws, maps.source


@dataclass(frozen=True)
class MaxOverBoxes:
    """Use a method for boxes as a method for whole images. The heatmap is the maximum over the boxes' heatmaps.

    The `output` of the returned `Heatmaps` is a list with one dict per image: `boxes`, `scores` and `labels` of the
    explained boxes, as in `BoxHeatmaps`, and their heatmaps as `maps` (N, h, w). With a target, an index or (B,)
    indices, only boxes of that class are kept.

    Args:
        method: a method for boxes, e.g. `ODAM`.
        max_boxes, min_score: as for `BoxMethod`.
    """

    method: BoxMethod
    max_boxes: int = 20
    min_score: float = SURE

    @property
    def name(self) -> str:
        return self.method.name

    def __call__(self, model: nn.Module, images_BCHW: Tensor, *, target: Target = None) -> Heatmaps:
        if callable(target):
            raise UsageError(
                "boxes are chosen by their class: pass its index as target, and no function or named target"
            )
        if target is not None:
            target = torch.as_tensor(target).reshape(-1).expand(len(images_BCHW))
        explained = self.method(model, images_BCHW, max_boxes=self.max_boxes, min_score=self.min_score)
        output: list[dict[str, Tensor]] = []
        heatmaps: list[Tensor] = []
        raws: list[Tensor] = []
        for number, image in enumerate(explained):
            keep_N = (
                torch.ones_like(image.labels, dtype=torch.bool) if target is None else image.labels == target[number]
            )
            output.append(
                {
                    "boxes": image.boxes[keep_N],
                    "scores": image.scores[keep_N],
                    "labels": image.labels[keep_N],
                    "maps": image.heatmaps[keep_N],
                }
            )
            for maxima, maps_Nhw in ((heatmaps, image.heatmaps[keep_N]), (raws, image.raw[keep_N])):
                maxima.append(maps_Nhw.amax(0) if len(maps_Nhw) else maps_Nhw.new_zeros(maps_Nhw.shape[1:]))
        return Heatmaps(torch.stack(heatmaps), torch.stack(raws), output, target, explained[0].source, self.method.name)
