"""Pictures with a single bright spot, whose position a test can measure."""

import numpy as np


def spot(height, width, y, x):
    """Return (height, width, 3) uint8, black with a Gaussian spot at (x, y)."""
    rows, columns = np.mgrid[0:height, 0:width]
    blob = np.exp(-((rows + 0.5 - y) ** 2 + (columns + 0.5 - x) ** 2) / 8)
    return np.repeat((255 * blob).astype(np.uint8)[..., None], 3, 2)
