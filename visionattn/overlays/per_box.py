"""Detected boxes of one image in pixels of the source, with their labels and heatmaps."""

from collections.abc import Sequence
from typing import NamedTuple, TypedDict, TypeGuard

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visionattn.data import Placement, visible
from visionattn.maps import SURE, BoxHeatmaps


class DetectedBoxes(NamedTuple):
    """Boxes of one image, without boxes that lie entirely in the padding.

    Attributes:
        boxes: xyxy in pixels of the source, rounded to a tenth.
        labels: class and score of each box, e.g. `"dog 0.90"`.
        maps: (N, h, w) in [0, 1], the heatmap of each box; None if the method makes none.
    """

    boxes: list[list[float]]
    labels: list[str]
    maps: NDArray[np.float32] | None


class PageDetections(TypedDict):
    """Detected boxes of one image, in the form that the explorer's page needs.

    Keys:
        boxes: (N, 4) xyxy in pixels of the source.
        labels: class index of each box.
        scores: of each box.
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
        maps: of the image.
        placement: of the source in the model's input.
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
        class_names: of the detector's labels; an index beyond them is shown as `class 7`.
        output: of the model for a batch; if it is not a detector's list of dicts, no boxes are returned.
        index: of the image in the batch.
        placement: of the source in the model's input.

    Returns:
        The boxes with a score of at least `maps.SURE`; with a method for boxes, all boxes that the method explains.
    """
    found = output[index] if isinstance(output, (list, tuple)) and index < len(output) else None
    if not _is_detection(found):
        return DetectedBoxes([], [], None)
    boxes_N4 = placement.boxes_to_source(found["boxes"].detach().float().cpu().numpy())
    scores_N, labels_N = found["scores"].detach().float().cpu().numpy(), found["labels"].cpu().numpy()
    # a method for boxes has already chosen the boxes that it explains
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
