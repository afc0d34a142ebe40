"""The export of one video: frames are read one by one, and outputs are written frame by frame."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from visionattn.data import MAX_PIXELS
from visionattn.errors import DataError
from visionattn.files import printable
from visionattn.overlays.folder.image_export import (
    ExportJob,
    ImageResult,
    LoadedImage,
    OutputFiles,
    encoded,
    reason_of,
    stamp_of,
)
from visionattn.overlays.folder.manifest import Entry, Facts, Stamp
from visionattn.overlays.folder.video import VideoFrames, VideoWriter
from visionattn.overlays.outputs import Output

_OF_FRAMES = ("heatmap", "raw", "glimpses")  # names of the arrays that differ from frame to frame


class VideoExport:
    """Reads the frames of a video and collects their outputs. Each method is called by one thread at a time.

    Attributes:
        path: path of the video.
        ended: whether the last frame was read.

    Args:
        job: settings of the export.
        path: path of the video.
        expect: function called with the number of frames once it is known.
    """

    def __init__(self, job: ExportJob, path: str, expect: Callable[[int], object]) -> None:
        self.path = path
        self.ended = False
        self._job, self._expect = job, expect
        self._stamp: Stamp = 0, 0
        self._frames: VideoFrames | None = None
        self._pictures: Iterator[tuple[float, NDArray[np.uint8]]] = iter(())
        self._films: dict[str, tuple[VideoWriter, str]] = {}
        self._arrays: dict[str, list[Mapping[str, NDArray[np.generic]]]] = {}
        self._at: list[float] = []
        self._facts: list[Facts] = []
        self._size = 0, 0
        self._failed = ""
        self._written = OutputFiles(job, job.done(path, self._stamp, {}))  # `finish` replaces the entry

    def read(self) -> LoadedImage | None:
        """Return the next frame, or None at the end of the video or after an error."""
        if self.ended:
            return None
        try:
            if self._frames is None:
                self._stamp = stamp_of(self.path)
                self._frames = VideoFrames(self.path, fps=self._job.fps, max_pixels=self._job.max_pixels)
                self._expect(self._frames.count)
                self._pictures = iter(self._frames)
            at, picture_HWC = next(self._pictures)
            return self._job.prepare(self.path, self._stamp, picture_HWC, video=self, at=at)
        except StopIteration:
            self.ended = True
        except Exception as error:  # an error in one file must not stop the others
            self.ended = True
            self.fail(reason_of(error, self.path))
        return None

    def add(self, frame: LoadedImage, explained: ImageResult, drawing: "Future[dict[str, Output]]") -> None:
        """Append a frame to the outputs.

        Args:
            frame: a frame of this video.
            explained: the frame's explanations and facts.
            drawing: future of the frame's outputs.
        """
        try:
            outputs = drawing.result()
            if self._failed:
                return
            self._at.append(round(frame.at, 3))
            self._facts.append(explained.facts)
            self._size = explained.explanations[0].placement.source_size
            for kind, part in outputs.items():
                if isinstance(part, bytes):
                    raise DataError(f"{kind} cannot be made of a video; leave it out of --save")
                if isinstance(part, np.ndarray):
                    self._film(kind).add(part)
                else:
                    self._arrays.setdefault(kind, []).append(part)
        except Exception as error:  # e.g. a full disk, or a frame of another size
            self.fail(reason_of(error, self.path))

    def fail(self, reason: str) -> None:
        """Mark the video as failed; if it has failed before, the earlier reason is kept."""
        self._failed = self._failed or reason

    def finish(self, secure: Callable[[], None]) -> Entry:
        """Complete the outputs, rename them as `OutputFiles.settle` does, and return the manifest's entry."""
        films = self._films.values()
        for film, _ in films:
            film.close()
        if not self._failed and not self._at:
            self.fail("contains no readable frame")
        try:
            if self._failed:
                raise DataError(self._failed)
            for film, name in films:
                if _count(film.path) != len(self._at):  # OpenCV does not report a full disk
                    raise DataError(f"{printable(name)} cannot be written completely; is the disk full?")
            for kind, parts in self._arrays.items():
                self._written.add(self._job.names[self.path][kind], encoded(self._stacked(parts), ".npz"))
        except DataError as error:
            self.drop()
            return self._job.failure(self.path, reason_of(error, self.path))
        self._written.entry = self._job.done(self.path, self._stamp, self._video_facts())
        return self._written.settle(secure)

    def drop(self) -> None:
        """Remove the temporary files."""
        for film, _ in self._films.values():
            film.close()
        self._written.drop()

    def _film(self, kind: str) -> VideoWriter:
        if kind not in self._films:
            assert self._frames is not None
            name = self._job.names[self.path][kind]
            self._films[kind] = VideoWriter(self._written.beside(name), self._frames.fps), name
        return self._films[kind][0]

    def _stacked(self, parts: list[Mapping[str, NDArray[np.generic]]]) -> Mapping[str, NDArray[np.generic]]:
        """Stack the arrays that differ between frames along a new first axis; keep the others as in the first frame."""
        of_frames = {key for key in parts[0] if key.rpartition("/")[2] in _OF_FRAMES}
        stacked = {
            key: np.stack([part[key] for part in parts]) if key in of_frames else parts[0][key] for key in parts[0]
        }
        return {**stacked, "at": np.array(self._at)}

    def _video_facts(self) -> Facts:
        """Return the facts of the most confident frame, and the prediction, probability and peak of every frame."""
        assert self._frames is not None
        most_confident = max(self._facts, key=lambda facts: facts["probability"] or 0)
        height, width = self._size
        return {
            "width": width,
            "height": height,
            **most_confident,
            "seconds": round(sum(facts["seconds"] for facts in self._facts), 6),
            "fps": round(self._frames.fps, 3),
            "frames": {
                "at": self._at,
                "prediction": [facts["prediction"] for facts in self._facts],
                "probability": [facts["probability"] for facts in self._facts],
                "peak": [facts["peak"] for facts in self._facts],
            },
        }


def _count(path: str) -> int:
    """Return the number of readable frames of a video file."""
    try:
        return sum(1 for _ in VideoFrames(path, max_pixels=MAX_PIXELS))
    except DataError:
        return 0
