"""A video on its way through an export: its frames one after another, its outputs growing with them."""

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from typing import Any

import numpy as np
from numpy.typing import NDArray

from visionattn.data.decode import MAX_PIXELS
from visionattn.errors import DataError
from visionattn.files import printable
from visionattn.overlays.folder.image_export import Explained, Job, Read, Written, encoded, reason_of, stamp_of
from visionattn.overlays.folder.video import Film, Frames
from visionattn.overlays.outputs import Made

_OF_FRAMES = ("heatmap", "raw", "glimpses")  # arrays that differ from frame to frame
_COLUMNS = ("prediction", "probability", "peak")


class Clip:
    """Reads the frames of a video, and gathers what is made of them; each method is called by one thread at a time.

    Attributes:
        ended: whether there is nothing more to read.

    Args:
        expect: is told how many frames there are.
    """

    def __init__(self, job: Job, path: str, expect: Callable[[int], object]) -> None:
        self.path = path
        self.ended = False
        self._job, self._expect = job, expect
        self._stamp = 0, 0
        self._frames: Frames | None = None
        self._pictures: Any = None
        self._films: dict[str, tuple[Film, str]] = {}
        self._arrays: dict[str, list[Mapping[str, NDArray[Any]]]] = {}
        self._at: list[float] = []
        self._facts: list[dict[str, Any]] = []
        self._size = 0, 0
        self._failed = ""
        self._written = Written(job, {"source": path})

    def read(self) -> Read | None:
        """The next frame; None at the end, and where nothing more can be read."""
        if self.ended:
            return None
        try:
            if self._frames is None:
                self._stamp = stamp_of(self.path)
                self._frames = Frames(self.path, fps=self._job.fps, max_pixels=self._job.max_pixels)
                self._expect(self._frames.count)
                self._pictures = iter(self._frames)
            at, picture_HWC = next(self._pictures)
            return self._job.prepare(self.path, self._stamp, picture_HWC, clip=self, at=at)
        except StopIteration:
            self.ended = True
        except Exception as error:  # whatever one file leads to, the others go on
            self.ended = True
            self.fail(reason_of(error, self.path))
        return None

    def add(self, frame: Read, explained: Explained, drawing: "Future[dict[str, Made]]") -> None:
        """Put a frame behind the others."""
        try:
            made = drawing.result()
            if self._failed:
                return
            self._at.append(round(frame.at, 3))
            self._facts.append(explained.facts)
            self._size = explained.looks[0].placement.source_size
            for kind, part in made.items():
                if isinstance(part, bytes):
                    raise DataError(f"{kind} cannot be made of a video")
                if isinstance(part, np.ndarray):
                    self._film(kind).add(part)
                else:
                    self._arrays.setdefault(kind, []).append(part)
        except Exception as error:  # a full disk; a frame of another size
            self.fail(reason_of(error, self.path))

    def fail(self, reason: str) -> None:
        """Give it up; the first reason counts."""
        self._failed = self._failed or reason

    def finish(self, secure: Callable[[], None]) -> dict[str, Any]:
        """Give the outputs their names, see `Written.settle`; returns the manifest's entry."""
        films = self._films.values()
        for film, _ in films:
            film.close()
        if not self._failed and not self._at:
            self.fail("holds no frame that can be read")
        try:
            if self._failed:
                raise DataError(self._failed)
            for film, name in films:
                if _count(film.path) != len(self._at):  # OpenCV does not tell of a full disk
                    raise DataError(f"{printable(name)} cannot be written whole; is the disk full?")
            for kind, parts in self._arrays.items():
                self._written.add(self._job.names[self.path][kind], encoded(self._stacked(parts), ".npz"))
        except DataError as error:
            self.drop()
            return self._job.failure(self.path, reason_of(error, self.path))
        self._written.entry = self._job.done(self.path, self._stamp, self._told())
        return self._written.settle(secure)

    def drop(self) -> None:
        """Leave nothing behind."""
        for film, _ in self._films.values():
            film.close()
        self._written.drop()

    def _film(self, kind: str) -> Film:
        if kind not in self._films:
            assert self._frames is not None
            name = self._job.names[self.path][kind]
            self._films[kind] = Film(self._written.beside(name), self._frames.fps), name
        return self._films[kind][0]

    def _stacked(self, parts: list[Mapping[str, NDArray[Any]]]) -> Mapping[str, NDArray[Any]]:
        of_frames = {key for key in parts[0] if key.rpartition("/")[2] in _OF_FRAMES}
        stacked = {
            key: np.stack([part[key] for part in parts]) if key in of_frames else parts[0][key] for key in parts[0]
        }
        return {**stacked, "at": np.array(self._at)}

    def _told(self) -> dict[str, Any]:
        """What the manifest says: of the surest frame all, of every frame what it shows."""
        assert self._frames is not None
        surest = max(self._facts, key=lambda facts: facts["probability"] or 0)
        frames = {column: [facts[column] for facts in self._facts] for column in _COLUMNS}
        height, width = self._size
        return {
            "width": width,
            "height": height,
            **surest,
            "seconds": round(sum(facts["seconds"] for facts in self._facts), 6),
            "fps": round(self._frames.fps, 3),
            "frames": {"at": self._at, **frames},
        }


def _count(path: str) -> int:
    """Frames that can be read."""
    try:
        return sum(1 for _ in Frames(path, max_pixels=MAX_PIXELS))
    except DataError:
        return 0
