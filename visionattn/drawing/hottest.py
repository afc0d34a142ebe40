"""The hottest pixels of a heatmap, and the difference of two heatmaps.

Pictures are (H, W, 3) uint8 RGB and are not changed in place.
"""

import cv2
import numpy as np
from numpy.typing import NDArray

from visionattn.data import Placement
from visionattn.drawing.overlay import check_pair, shade
from visionattn.errors import UsageError


def top(heatmap_HW: NDArray[np.floating], fraction: float) -> NDArray[np.bool_]:
    """Return the mask of the hottest pixels.

    Args:
        heatmap_HW: (H, W), any values.
        fraction: fraction of the pixels to select, in (0, 1].

    Returns:
        (H, W) bool: True for this fraction of the pixels, or for more pixels if several are exactly as hot as the
        threshold. Pixels with the minimum value are never True, so a constant heatmap has no hottest pixels.

    Raises:
        UsageError: the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise UsageError(f"the fraction of hottest pixels must be in (0, 1], got {fraction}")
    flat = np.asarray(heatmap_HW).ravel()
    place = flat.size - max(1, round(fraction * flat.size))
    return (heatmap_HW >= np.partition(flat, place)[place]) & (heatmap_HW > flat.min())


def show_hottest(
    image_HWC: NDArray[np.uint8], heatmap_HW: NDArray[np.floating], *, fraction: float = 0.2
) -> NDArray[np.uint8]:
    """Show the hottest pixels unchanged, and all other pixels dark and grey.

    Args:
        image_HWC: the picture.
        heatmap_HW: a heatmap of the picture's size.
        fraction: fraction of the pixels to show unchanged, in (0, 1].

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UsageError: the sizes differ, or the fraction is out of range.
    """
    check_pair(image_HWC, heatmap_HW)
    drawn = shade(image_HWC)
    cv2.copyTo(np.ascontiguousarray(image_HWC), top(heatmap_HW, fraction).view(np.uint8), drawn)
    return drawn


def heatmap_difference(
    first: tuple[NDArray[np.floating], Placement], second: tuple[NDArray[np.floating], Placement]
) -> tuple[float, tuple[float, float] | None]:
    """Measure the difference of two heatmaps of one picture.

    The heatmaps are compared on a grid of at most 128 × 128 points of the picture. Points outside of either model's
    input are left out.

    Args:
        first, second: each a heatmap in [0, 1] and the placement of the picture in its model's input.

    Returns:
        The mean of |second − first| in [0, 1], and the point of the largest difference, (x, y) in pixels of the source.
        The point is None for equal heatmaps.
    """
    height, width = first[1].source_size
    size = min(height, 128), min(width, 128)
    enlarge = Placement.scaling(size, (height, width))
    placed = [(heatmap_hw, placement @ enlarge) for heatmap_hw, placement in (first, second)]
    apart_HW = np.abs(placed[1][1].carry(placed[1][0]) - placed[0][1].carry(placed[0][0]))
    seen_HW = placed[0][1].seen() & placed[1][1].seen()
    apart_HW = np.where(seen_HW, apart_HW, 0)
    if not apart_HW.any():
        return 0.0, None
    row, column = np.unravel_index(int(apart_HW.argmax()), apart_HW.shape)
    place = (float(column) + 0.5) * width / size[1], (float(row) + 0.5) * height / size[0]
    return float(apart_HW.sum() / seen_HW.sum()), place
