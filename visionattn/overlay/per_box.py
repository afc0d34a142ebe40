"""The heatmap of each box over its picture."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionattn.data.boxes import visible
from visionattn.data.placement import Placement
from visionattn.maps.boxes import BoxMaps
from visionattn.overlay.draw import blend, boxes


def overlays_of_boxes(
    image_HWC: NDArray[np.uint8],
    placement: Placement,
    boxes_N4: NDArray[np.floating],
    heatmaps_Nhw: NDArray[np.floating],
    *,
    labels: Sequence[str] = (),
    colormap: str = "inferno",
    alpha: float = 0.75,
) -> list[NDArray[np.uint8]]:
    """Lay the heatmap of each box over the picture, with that box and its label.

    Args:
        image_HWC: the source.
        placement: of the source in the detector's input.
        boxes_N4: xyxy in pixels of the input, as `maps.boxes.BoxMaps` has them.
        heatmaps_Nhw: in [0, 1], each spanning the whole input.
        labels: one a box, or none.
        colormap, alpha: as `blend`.

    Returns:
        N pictures of the source's size.
    """
    seen_HW = placement.seen()
    pictures = []
    for number, (box_4, heatmap_hw) in enumerate(zip(placement.boxes_to_source(boxes_N4), heatmaps_Nhw, strict=True)):
        overlay = blend(image_HWC, placement.carry(heatmap_hw), colormap=colormap, alpha=alpha, seen_HW=seen_HW)
        pictures.append(boxes(overlay, [box_4], labels=labels[number : number + 1]))
    return pictures


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
