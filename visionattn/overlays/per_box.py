"""Detected boxes of one image in pixels of the source, with their labels and heatmaps."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visionattn.data import Placement, visible
from visionattn.maps import SURE, BoxHeatmaps


class DetectedBoxes(NamedTuple):
    """Detected boxes of one image, except boxes that lie entirely in the padding.

    Attributes:
        boxes: xyxy in pixels of the source, rounded to a tenth.
        labels: class and score of each box, e.g. `"dog 0.90"`.
        maps: (N, h, w) in [0, 1], the heatmap of each box; None if the method makes no heatmap per box.
    """

    boxes: list[list[float]]
    labels: list[str]
    maps: NDArray[np.float32] | None


class PageDetections(TypedDict):
    """Detected boxes of one image, as the explorer's page needs them.

    Keys:
        boxes: (N, 4) xyxy in pixels of the source.
        labels: class index of each box.
        scores: score of each box.
        maps: (N, h, w) in [0, 1], the heatmap of each box.
        shows: what the heatmaps show, e.g. `"score by features"`.
    """

    boxes: NDArray[np.float64]
    labels: list[int]
    scores: list[float]
    maps: NDArray[np.float32]
    shows: str


def page_detections(maps: BoxHeatmaps, placement: Placement) -> PageDetections:
    """Return the boxes of one image in pixels of the source, with their heatmaps.

    Boxes that lie entirely in the padding are left out.

    Args:
        maps: the boxes of the image and their heatmaps.
        placement: placement of the source in the model's input.
    """
    boxes_N4 = placement.boxes_to_source(maps.boxes.float().cpu().numpy())
    seen_N = visible(boxes_N4)
    return {
        "boxes": boxes_N4[seen_N],
        "labels": maps.labels.cpu().numpy()[seen_N].tolist(),
        "scores": maps.scores.cpu().numpy()[seen_N].tolist(),
        "maps": maps.heatmaps.cpu().numpy()[seen_N],
        "shows": maps.source,
    }


def detected_boxes(class_names: Sequence[str], output: object, index: int, placement: Placement) -> DetectedBoxes:
    """Return the confident boxes of one image.

    Args:
        class_names: names of the detector's classes. A label without a name is shown as e.g. `class 7`.
        output: the model's output for a batch; unless it is a detector's list of dicts, no boxes are returned.
        index: index of the image in the batch.
        placement: placement of the source in the model's input.

    Returns:
        With a method for boxes, all boxes that the method explains; otherwise the boxes with a score of at least
        `maps.SURE`.
    """
    found = output[index] if isinstance(output, (list, tuple)) and index < len(output) else None
    if not _is_detection(found):
        return DetectedBoxes([], [], None)
    boxes_N4 = placement.boxes_to_source(found["boxes"].detach().float().cpu().numpy())
    scores_N, labels_N = found["scores"].detach().float().cpu().numpy(), found["labels"].cpu().numpy()
    # with "maps", a method for boxes has already selected the boxes
    shown_N = visible(boxes_N4) & (np.bool_("maps" in found) | (scores_N >= SURE))
    labels = [
        f"{class_names[label] if label < len(class_names) else f'class {label}'} {score:.2f}"
        for label, score in zip(labels_N[shown_N].tolist(), scores_N[shown_N].tolist(), strict=True)
    ]
    maps_Nhw = found["maps"].float().cpu().numpy()[shown_N] if "maps" in found else None
    boxes = [[round(edge, 1) for edge in box] for box in boxes_N4[shown_N].tolist()]
    return DetectedBoxes(boxes, labels, maps_Nhw)


def _is_detection(found: object) -> TypeGuard[dict[str, Tensor]]:
    return isinstance(found, dict) and {"boxes", "scores", "labels"} <= found.keys()
