"""Random pictures and heatmaps with 256 levels, and the colours of colormaps."""

import cv2
import numpy as np

from visionattn import drawing


def picture(height=9, width=13, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ramp(height=9, width=13):
    """A random heatmap with values k / 255, so that rounding to 256 levels loses nothing."""
    levels = np.random.default_rng(1).integers(0, 256, (height, width))
    levels.flat[0], levels.flat[-1] = 0, 255
    return (levels / 255).astype(np.float32)


def colour_of(level, colormap):
    return cv2.applyColorMap(np.full((1, 1), level, np.uint8), drawing.COLORMAPS[colormap])[0, 0, ::-1].astype(float)
