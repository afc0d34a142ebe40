"""An animation of two glimpses with known patches, for several tests."""

import numpy as np

from visionattn.drawing import animate_glimpses


def film(side=60, **options):
    """Animate two glimpses. The coarse patch of the second glimpse covers the whole picture."""
    image = np.full((30, 30, 3), 100, np.uint8)
    boxes = np.array([[[4.0, 4, 8, 8], [2, 2, 10, 10]], [[20, 20, 24, 24], [0, 0, 30, 30]]])
    patches = np.zeros((2, 2, 4, 4, 3), np.uint8)
    patches[0, 0], patches[0, 1], patches[1, 0], patches[1, 1] = 200, 150, 250, 50
    patches[0, 0, 2, 1] = (10, 20, 30)
    return animate_glimpses(image, boxes, patches, side=side, **options)
