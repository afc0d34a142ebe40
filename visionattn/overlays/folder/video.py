"""Read and write videos frame by frame with OpenCV, without torch.

Sound is not copied. The format needs an even width and height, so a frame of odd width or height loses its last column
or row.
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

# unreadable files raise a DataError, so FFmpeg and OpenCV need not print their own messages
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")
if hasattr(cv2.utils, "logging"):  # since OpenCV 5.0
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)
else:
    cv2.setLogLevel(2)  # type: ignore[attr-defined]  # OpenCV 4: the stubs lack it; 2 is the level of errors

SUFFIX = ".mp4"
"""Videos are MPEG-4 part 2, the only codec that OpenCV's wheels can write and video players can play. *Measured*: a
frame of 640 × 480 takes 2 ms. Browsers play VP8 and VP9 instead, which take 14 and 73 ms."""


class VideoFrames:
    """The frames of a video, in order.

    Attributes:
        path: path of the video.
        fps: number of yielded frames per second of video.
        count: approximate number of yielded frames; 0 if unknown.

    Args:
        path: any file name, even one that is not valid UTF-8.
        fps: frames to sample per second: the first frame at or after each multiple of 1 / fps seconds. With None, or
            with a rate above the video's own, every frame is sampled.
        max_pixels: largest allowed width × height.

    Raises:
        DataError: there is no such file, it is not a video, or its frames are too large.
    """

    def __init__(self, path: str, *, fps: float | None = None, max_pixels: int) -> None:
        if not os.path.exists(path):
            raise DataError(f"there is no video {printable(path)}")
        self.path = path
        with _readable(path) as name:
            self._capture = cv2.VideoCapture(name, cv2.CAP_FFMPEG)
        self._rate = self._capture.get(cv2.CAP_PROP_FPS)
        if not self._capture.isOpened() or not 0 < self._rate < 1000:
            raise DataError(f"{printable(path)} cannot be read as a video")
        width, height = (self._capture.get(side) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        if width * height > max_pixels:
            raise DataError(
                f"{printable(path)}: {width:,.0f} × {height:,.0f} pixels; the limit is {max_pixels / 1e6:,.0f} MP "
                "(--max-pixels)"
            )
        self.fps = self._rate if fps is None else min(fps, self._rate)
        self.count = max(0, round(self._capture.get(cv2.CAP_PROP_FRAME_COUNT) * self.fps / self._rate))

    def __iter__(self) -> Iterator[tuple[float, NDArray[np.uint8]]]:
        """Yield (seconds from the start, (H, W, 3) uint8 RGB), rotated upright by the video's orientation tag."""
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


class VideoWriter:
    """Writes a video frame by frame.

    Args:
        path: path of the file; it ends in `SUFFIX`.
        fps: frames per second.
    """

    def __init__(self, path: str, fps: float) -> None:
        self.path, self._fps = path, fps
        self._writer: cv2.VideoWriter | None = None

    def add(self, picture: NDArray[np.uint8] | NDArray[np.uint16]) -> None:
        """Write a frame.

        Args:
            picture: (H, W, 3) uint8 RGB, or (H, W) uint8 or uint16 grey. All frames have the same size.

        Raises:
            DataError: the file cannot be written.
        """
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
        """Complete the file."""
        if self._writer is not None:
            self._writer.release()


@contextlib.contextmanager
def _readable(path: str) -> Iterator[str]:
    """Yield a name that OpenCV can open: a temporary link if the name is not valid UTF-8, on which OpenCV crashes."""
    try:
        os.fsencode(path).decode()
    except UnicodeDecodeError:
        with tempfile.TemporaryDirectory() as folder:
            link = os.path.join(folder, "video")
            os.symlink(path, link)
            yield link
    else:
        yield path
