"""The pipeline of an export: images are read, explained, drawn and written at the same time.

While the models process one batch, threads read the next images and draw the overlays of earlier batches. Other threads
wait until the written files are on disk. OpenCV and Pillow release Python's global interpreter lock (GIL) during all
long operations, so the threads run in parallel.
"""

import contextlib
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

from visionattn.data import is_video
from visionattn.errors import BlankMapWarning, DataError, MapWarning
from visionattn.overlays.folder.image_export import ExportJob, ImageResult, ImageTask, LoadedImage, OutputFiles
from visionattn.overlays.folder.journal import Journal
from visionattn.overlays.folder.manifest import Entry, Failed, Manifest
from visionattn.overlays.folder.video_export import VideoExport

_WAITERS = 8  # threads that wait for the disk; the disk handles their requests together

Pending: TypeAlias = "Future[Entry] | Future[None] | Entry"
"""An entry, or a future of one. A video frame's future returns None, since the video's entry comes after all frames."""

_Item: TypeAlias = LoadedImage | Failed | VideoExport
"""An image or frame, a failure, or a video after its last frame."""


class Work(Protocol):
    """The work of an export, done by one process or shared by several; see `OneProcess` and `processes.Processes`.

    Attributes:
        rank: rank of this process; the process of rank 0 leads the others.
        size: number of processes.
        trouble: the error that stopped another process; "" if there was none.
        lost: why each process that was killed or is silent made no more outputs.
    """

    rank: int
    size: int
    trouble: str
    lost: list[str]

    def lay_out(self, portions: Iterable[list[ImageTask]]) -> None: ...

    def images(self) -> Iterator[ImageTask]: ...

    def tally(self, **counts: int) -> dict[str, int]: ...

    def wait(self) -> Iterator[dict[str, int]]: ...

    def finish(self, error: str = "") -> None: ...


class OneProcess:
    """The work of an export that runs in a single process."""

    rank, size, trouble = 0, 1, ""

    def __init__(self) -> None:
        self.lost: list[str] = []
        self._portions: Iterable[list[ImageTask]] = ()
        self._tally: Counter[str] = Counter()
        self._lock = threading.Lock()  # the thread that reads videos also calls `tally`

    def lay_out(self, portions: Iterable[list[ImageTask]]) -> None:
        """Set the images to export, in portions."""
        self._portions = portions

    def images(self) -> Iterator[ImageTask]:
        """Yield the images one by one."""
        for portion in self._portions:
            yield from portion

    def tally(self, **counts: int) -> dict[str, int]:
        """Add to the counters and return their sums."""
        with self._lock:
            self._tally.update(counts)
            return dict(self._tally)

    def wait(self) -> Iterator[dict[str, int]]:
        """Yield nothing, because there is no other process."""
        return iter(())

    def finish(self, error: str = "") -> None:
        """Do nothing, because there is no other process."""


def run(
    job: ExportJob,
    processes: Work,
    manifest: Manifest | Journal,
    note: Callable[[Entry], None],
    advance: Callable[[dict[str, int]], None],
    warn: Callable[[str], None],
    batch_size: int,
    workers: int,
) -> None:
    """Export this process's images. While the models run, up to two later batches are read, and two earlier ones
    written.

    Args:
        job: settings of the export.
        processes: gives this process its share of the images.
        manifest: records the outputs that are about to be written.
        note: called with the entry of each finished or failed image.
        advance: called with the sums of the counters after each image or frame.
        warn: called with the message of each `MapWarning`, except of constant heatmaps.
        batch_size: images per forward pass.
        workers: threads that read and draw.

    Raises:
        UsageError: the method does not fit the model, or a batch does not fit into the device's memory.
        DataError: all images of the first batch fail in the model, or the manifest cannot be written.
    """

    def settled(written: Pending) -> None:
        entry = written.result() if isinstance(written, Future) else written
        if entry is not None:
            note(entry)
        advance(processes.tally(done=1, failed=int(isinstance(entry, Failed))))

    unsettled: deque[Pending] = deque()
    threads = _Threads(workers)
    open_videos: set[VideoExport] = set()
    first = True
    paths = map(job.accept, processes.images())
    todo = (
        VideoExport(job, path, lambda count: processes.tally(frames=count)) if is_video(path) else path
        for path in paths
    )
    try:
        with _forward_map_warnings(warn):
            for batch in _batches(_read_ahead(threads, job, todo, 2 * batch_size), batch_size):
                good = [image for image in batch if isinstance(image, LoadedImage)]
                explained = job.explain(good)
                failed = [result.reason for result in explained if isinstance(result, Failed)]
                several = len({image.path for image in good}) > 1
                if first and several and len(failed) == len(good) and not job.requests:
                    raise DataError(failed[0])  # no image of the first batch can be explained: the model is at fault
                first = first and not good
                for image in good:
                    if image.video not in open_videos:
                        manifest.promise(
                            [(name, image.path) for name in job.names[image.path].values()],
                            job.fingerprint_of(image.path),
                        )
                        if isinstance(image.video, VideoExport):
                            open_videos.add(image.video)
                results = iter(explained)
                for item in batch:
                    if isinstance(item, LoadedImage):
                        unsettled.append(_hand_over(job, threads, manifest.secure, item, next(results)))
                    elif isinstance(item, VideoExport):
                        unsettled.append(threads.frame_writer.submit(item.finish, manifest.secure))
                        open_videos.discard(item)
                    else:
                        unsettled.append(item)
                while len(unsettled) > 2 * batch_size:
                    settled(unsettled.popleft())
            while unsettled:
                settled(unsettled.popleft())
    finally:
        threads.end()
        for video in open_videos:
            video.drop()
        for pending in unsettled:  # left after an error or Ctrl-C: note the images that threads have finished
            try:
                settled(pending)
            except (CancelledError, DataError):
                continue


@contextlib.contextmanager
def _forward_map_warnings(warn: Callable[[str], None]) -> Iterator[None]:
    """Call `warn` with the message of each `MapWarning` in this context, and show other warnings as before.

    Warnings of constant heatmaps are dropped, since the export counts these heatmaps.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("always", MapWarning)
        show = warnings.showwarning

        def forward(message: Warning | str, category: type[Warning], *details: Any, **more: Any) -> None:
            if not issubclass(category, MapWarning):
                show(message, category, *details, **more)
            elif not issubclass(category, BlankMapWarning):
                warn(str(message))

        warnings.showwarning = forward
        yield


class _Threads:
    """The threads of an export.

    Attributes:
        pool: threads that read and draw images.
        frame_reader: one thread that reads the frames of videos, in order.
        frame_writer: one thread that writes the frames of videos, in order.
        disk: threads that wait until files are on disk.
    """

    def __init__(self, workers: int) -> None:
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="overlay")
        self.frame_reader = ThreadPoolExecutor(1, thread_name_prefix="frame reader")
        self.frame_writer = ThreadPoolExecutor(1, thread_name_prefix="frame writer")
        self.disk = ThreadPoolExecutor(_WAITERS, thread_name_prefix="disk")

    def end(self) -> None:
        """Cancel the tasks of `pool` that have not begun, and wait for all other tasks."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        for threads in (self.disk, self.frame_reader, self.frame_writer):
            threads.shutdown(wait=True)


def _hand_over(
    job: ExportJob, threads: _Threads, secure: Callable[[], None], image: LoadedImage, result: ImageResult | Failed
) -> Pending:
    """Submit the drawing and writing of one explained image or frame."""
    if isinstance(result, Failed):
        job.release(image)
        return threads.frame_writer.submit(image.video.fail, result.reason) if image.video else result
    if image.video:
        return threads.frame_writer.submit(image.video.add, image, result, threads.pool.submit(job.draw, image, result))
    return threads.disk.submit(_settle, secure, threads.pool.submit(job.write, image, result))


def _settle(secure: Callable[[], None], writing: "Future[OutputFiles | Failed]") -> Entry:
    written = writing.result()
    return written.settle(secure) if isinstance(written, OutputFiles) else written


def _read_ahead(threads: _Threads, job: ExportJob, todo: Iterable[str | VideoExport], count: int) -> Iterator[_Item]:
    """Read up to `count` items ahead; yield images and frames in order, and each video after its last frame."""
    waiting: deque[Future[LoadedImage | Failed] | Future[LoadedImage | None] | VideoExport] = deque()
    for source in todo:
        if isinstance(source, VideoExport):
            while not source.ended:
                waiting.append(threads.frame_reader.submit(source.read))
                if len(waiting) > count:
                    yield from _read(waiting.popleft())
            waiting.append(source)
        else:
            waiting.append(threads.pool.submit(job.read, source))
        if len(waiting) > count:
            yield from _read(waiting.popleft())
    while waiting:
        yield from _read(waiting.popleft())


def _read(
    source: "Future[LoadedImage | Failed] | Future[LoadedImage | None] | VideoExport",
) -> Iterator[_Item]:
    item = source if isinstance(source, VideoExport) else source.result()
    if item is not None:
        yield item


def _batches(items: Iterator[_Item], batch_size: int) -> Iterator[list[_Item]]:
    """Group items in order: each group has `batch_size` readable images, or 4 · `batch_size` items of any kind.

    The last group may be smaller.
    """
    batch: list[_Item] = []
    good = 0
    for item in items:
        batch.append(item)
        good += isinstance(item, LoadedImage)
        if good == batch_size or len(batch) >= 4 * batch_size:
            yield batch
            batch, good = [], 0
    if batch:
        yield batch
