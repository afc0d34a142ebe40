"""What a detector found in one image, in pixels of the source: boxes, labels, and a heatmap for each box."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from visionattn.data.annotations.boxes import visible
from visionattn.data.placement import Placement
from visionattn.maps.boxes import SURE, BoxMaps

Found: TypeAlias = "tuple[list[list[float]], list[str], NDArray[np.float32] | None]"
"""Boxes xyxy in pixels of the source, their labels, and (N, h, w) heatmaps where a method for boxes made them."""


def told_of_boxes(maps: BoxMaps, placement: Placement) -> dict[str, Any]:
    """The boxes of an image as a page takes them: in pixels of the source, with their heatmaps and what these show; but
    for those in the padding alone."""
    boxes_N4 = placement.boxes_to_source(maps.boxes.float().cpu().numpy())
    seen_N = visible(boxes_N4)
    return {
        "boxes": boxes_N4[seen_N],
        "labels": maps.labels.cpu().numpy()[seen_N].tolist(),
        "scores": maps.scores.cpu().numpy()[seen_N].tolist(),
        "maps": maps.heatmaps.cpu().numpy()[seen_N],
        "shows": maps.source,
    }


def found_of(class_names: Sequence[str], output: Any, place: int, placement: Placement) -> Found:
    """What a detector is sure of in one image: boxes in pixels of the source, labels, and with a method for boxes their
    heatmaps (N, h, w). What it found in the padding alone is left out."""
    one = output[place] if isinstance(output, (list, tuple)) and place < len(output) else None
    if not isinstance(one, dict) or not {"boxes", "scores", "labels"} <= one.keys():
        return [], [], None
    boxes_N4 = placement.boxes_to_source(one["boxes"].detach().float().cpu().numpy())
    scores_N, labels_N = one["scores"].detach().float().cpu().numpy(), one["labels"].cpu().numpy()
    # a method for boxes has chosen those that it explains
    shown_N = visible(boxes_N4) & (np.bool_("maps" in one) | (scores_N >= SURE))
    labels = [
        f"{class_names[label] if label < len(class_names) else f'class {label}'} {score:.2f}"
        for label, score in zip(labels_N[shown_N].tolist(), scores_N[shown_N].tolist(), strict=True)
    ]
    maps_Nhw = one["maps"].float().cpu().numpy()[shown_N] if "maps" in one else None
    return [[round(edge, 1) for edge in box] for box in boxes_N4[shown_N].tolist()], labels, maps_Nhw


def has_maps(output: Any) -> bool:
    """Whether there is a heatmap for each box."""
    return isinstance(output, list) and all(isinstance(one, dict) and "maps" in one for one in output)
