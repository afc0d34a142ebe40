"""Shrink and enlarge pictures. Pictures are (H, W, 3) uint8 RGB and are not changed in place."""

import cv2
import numpy as np
from numpy.typing import NDArray


def shrink(image_HWC: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Shrink a picture to a longer side of at most `side` pixels. Each new pixel is the mean of the area it covers."""
    height, width = image_HWC.shape[:2]
    scale = side / max(height, width)
    if scale >= 1:
        return image_HWC
    size = max(1, round(width * scale)), max(1, round(height * scale))
    return np.asarray(cv2.resize(image_HWC, size, interpolation=cv2.INTER_AREA), np.uint8)


def enlarge(image_HWC: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Enlarge a picture: each pixel becomes a square of `factor` × `factor` pixels."""
    return image_HWC.repeat(factor, 0).repeat(factor, 1)
