"""Short videos."""

import cv2
import numpy as np


def film(path, shades, *, fps=10.0, size=(32, 48)):
    """Write a video of uniform grey frames, one for each shade."""
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), fps, size[::-1])
    for shade in shades:
        writer.write(np.full((*size, 3), shade, np.uint8))
    writer.release()
    return path
