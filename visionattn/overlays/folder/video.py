"""Videos, frame by frame: what OpenCV reads of one, and the .mp4 that it writes. No torch.

Sound is not carried over. An odd width or height loses its last column or row, as the format wants it.
"""

import contextlib
import os
import tempfile
from collections.abc import Iterator

import cv2
import numpy as np
from numpy.typing import NDArray

from visionattn.errors import DataError
from visionattn.files import printable

# what is wrong with a file is told once, by us
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
if hasattr(cv2.utils, "logging"):  # from 5.0 on
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
else:
    cv2.setLogLevel(2)  # type: ignore[attr-defined]  # the same

SUFFIX = ".mp4"
"""MPEG-4 part 2: of what OpenCV's wheels can write, the one that players know; 2 ms a frame of 640 × 480. Browsers know
VP8 and VP9 instead, which took 14 and 73."""


class Frames:
    """The frames of a video, in order.

    Attributes:
        fps: frames a second that are given.
        count: about how many there are; 0 where the file does not say.

    Args:
        path: any file name, also one that is no text.
        fps: frames a second to take, each the first after its time; all where None or more than there are.

    Raises:
        DataError: there is no such file, or it is no video that can be read.
    """

    def __init__(self, path: str, *, fps: float | None = None, max_pixels: int) -> None:
        if not os.path.exists(path):
            raise DataError(f"there is no video {printable(path)}")
        self.path = path
        with _readable(path) as name:
            self._capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
        self._rate = self._capture.get(cv2.CAP_PROP_FPS)
        if not self._capture.isOpened() or not 0 < self._rate < 1000:
            raise DataError(f"{printable(path)} is no video that can be read")
        width, height = (self._capture.get(side) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > max_pixels:
            raise DataError(
                f"{printable(path)}: {width:,.0f} × {height:,.0f} pixels; the limit is {max_pixels / 1e6:,.0f} MP "
                "(--max-pixels)"
            )
        self.fps = self._rate if fps is None else min(fps, self._rate)
        self.count = max(0, round(self._capture.get(cv2.CAP_PROP_FRAME_COUNT) * self.fps / self._rate))

    def __iter__(self) -> Iterator[tuple[float, NDArray[np.uint8]]]:
        """Yield (seconds from the start, picture), RGB, turned as the camera noted."""
        number, taken = 0, 0
        while self._capture.grab():
            at = number / self._rate
            number += 1
            if at * self.fps + 1e-6 < taken:
                continue
            taken += 1
            good, frame_HWC = self._capture.retrieve()
            if good:
                yield at, np.ascontiguousarray(frame_HWC[..., ::-1])
        self._capture.release()


class Film:
    """A video that is written frame by frame.

    Raises:
        DataError: it cannot be written.
    """

    def __init__(self, path: str, fps: float) -> None:
        self.path, self._fps = path, fps
        self._writer: cv2.VideoWriter | None = None

    def add(self, picture: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
        """Write a frame: (H, W, 3) RGB, or (H, W) grey of 8 or 16 bits; all of one size."""
        if picture.dtype == np.uint16:
            picture = (picture >> 8).astype(np.uint8)
        frame_HWC = cv2.cvtColor(picture, cv2.COLOR_GRAY2BGR if picture.ndim == 2 else cv2.COLOR_RGB2BGR)
        if self._writer is None:
            size = frame_HWC.shape[1], frame_HWC.shape[0]
            self._writer = cv2.VideoWriter(self.path, cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*"mp4v"), self._fps, size)
            if min(size) < 2 or not self._writer.isOpened():
                raise DataError(f"{printable(self.path)} cannot be written as a video")
        self._writer.write(frame_HWC)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.release()


@contextlib.contextmanager
def _readable(path: str) -> Iterator[str]:
    """A name that OpenCV takes; of one that is no text it would crash."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = os.path.join(folder, "video")
            os.symlink(path, link)
            yield link
    else:
        yield path
