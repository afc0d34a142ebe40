"""The way of images through an export: read, explain, draw and write at the same time.

Threads read images and draw overlays while models work on the batches between, and others wait for the disk; OpenCV and
Pillow let go of the interpreter's lock for all that takes long.
"""

import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, Protocol, TypeAlias

from visionattn.data.image_files import is_video
from visionattn.errors import DataError, MapWarning
from visionattn.overlays.folder.image_export import Explained, Job, Read, Written
from visionattn.overlays.folder.journal import Journal
from visionattn.overlays.folder.manifest import Manifest
from visionattn.overlays.folder.video_export import Clip

_WAITERS = 8  # threads that wait for the disk; those that wait together are served together

Entry: TypeAlias = dict[str, Any]
Pending: TypeAlias = "Future[Entry] | Future[None] | Entry"
"""An entry, one that is being made, or a frame whose video has none yet."""


class Work(Protocol):
    """The work of an export, which one process does or several share; see `OneProcess` and `processes.Team`."""

    rank: int
    size: int
    trouble: str

    def give(self, portions: Iterable[list[dict[str, Any]]]) -> None: ...

    def share(self) -> Iterator[dict[str, Any]]: ...

    def tally(self, **counts: int) -> dict[str, int]: ...

    def wait(self) -> Iterator[dict[str, int]]: ...

    def finish(self, error: str = "") -> None: ...


class OneProcess:
    """All the work, done by this process."""

    rank, size, trouble = 0, 1, ""

    def __init__(self) -> None:
        self._portions: Iterable[list[dict[str, Any]]] = ()
        self._tally: Counter[str] = Counter()
        self._lock = threading.Lock()  # frames of videos are counted by the thread that reads them

    def give(self, portions: Iterable[list[dict[str, Any]]]) -> None:
        """Lay out the work: what `Job.told` says of each image, in portions."""
        self._portions = portions

    def share(self) -> Iterator[dict[str, Any]]:
        """Yield one image after another."""
        for portion in self._portions:
            yield from portion

    def tally(self, **counts: int) -> dict[str, int]:
        """Add to what was counted, and return the sums."""
        with self._lock:
            self._tally.update(counts)
            return dict(self._tally)

    def wait(self) -> Iterator[dict[str, int]]:
        """Yield nothing: there is no other process."""
        return iter(())

    def finish(self, error: str = "") -> None:
        """Do nothing: no other process asks."""


def run(
    job: Job,
    team: Work,
    manifest: Manifest | Journal,
    note: Callable[[Entry], None],
    advance: Callable[[dict[str, int]], None],
    batch_size: int,
    workers: int,
) -> None:
    """Make this process's share: read ahead by two batches, and write behind by two."""

    def settled(written: Pending) -> None:
        entry = written.result() if isinstance(written, Future) else written
        if entry is not None:
            note(entry)
        advance(team.tally(done=1, failed=int(entry is not None and entry["status"] == "failed")))

    behind: deque[Pending] = deque()
    threads = _Threads(workers)
    rolling: set[Clip] = set()  # begun and not finished
    first = True
    paths = map(job.take, team.share())
    todo = (Clip(job, path, lambda count: team.tally(frames=count)) if is_video(path) else path for path in paths)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MapWarning)  # that a heatmap is constant is told in the manifest
            for batch in _batches(_read_ahead(threads, job, todo, 2 * batch_size), batch_size):
                good = [image for image in batch if isinstance(image, Read)]
                explained = job.explain(good)
                failed = [result["reason"] for result in explained if isinstance(result, dict)]
                several = len({image.path for image in good}) > 1
                if first and several and len(failed) == len(good) and not job.wishes:
                    raise DataError(failed[0])  # not these images, nor what a list asks of them: the model
                first = first and not good
                for image in good:
                    if image.clip not in rolling:
                        manifest.promise(
                            [(name, image.path) for name in job.names[image.path].values()], job.recipe_of(image.path)
                        )
                        rolling |= {image.clip} - {None}
                results = iter(explained)
                for one in batch:
                    if isinstance(one, Read):
                        behind.append(_hand_over(job, threads, manifest.secure, one, next(results)))
                    elif isinstance(one, Clip):
                        behind.append(threads.film.submit(one.finish, manifest.secure))
                        rolling.discard(one)
                    else:
                        behind.append(one)
                while len(behind) > 2 * batch_size:
                    settled(behind.popleft())
            while behind:
                settled(behind.popleft())
    finally:
        threads.end()
        for clip in rolling:
            clip.drop()
        for left in behind:  # after an error or Ctrl-C: what threads had begun is finished and noted
            try:
                settled(left)
            except (CancelledError, DataError):
                continue


class _Threads:
    """Those that read and draw, one that reads frames and one that writes them, and those that wait for the disk."""

    def __init__(self, workers: int) -> None:
        self.pool = ThreadPoolExecutor(workers, thread_name_prefix="overlay")
        self.reel = ThreadPoolExecutor(1, thread_name_prefix="reel")  # frames keep their order
        self.film = ThreadPoolExecutor(1, thread_name_prefix="film")
        self.disk = ThreadPoolExecutor(_WAITERS, thread_name_prefix="disk")

    def end(self) -> None:
        """Finish what was begun, and nothing more."""
        self.pool.shutdown(wait=True, cancel_futures=True)
        for threads in (self.disk, self.reel, self.film):
            threads.shutdown(wait=True)


def _hand_over(
    job: Job, threads: _Threads, secure: Callable[[], None], image: Read, result: Explained | Entry
) -> "Pending":
    """Have what was found in one image or frame drawn and written."""
    if isinstance(result, dict):
        job.let_go(image)
        return threads.film.submit(image.clip.fail, result["reason"]) if image.clip else result
    if image.clip:
        return threads.film.submit(image.clip.add, image, result, threads.pool.submit(job.draw, image, result))
    return threads.disk.submit(_settle, secure, threads.pool.submit(job.write, image, result))


def _settle(secure: Callable[[], None], writing: "Future[Written | Entry]") -> Entry:
    written = writing.result()
    return written.settle(secure) if isinstance(written, Written) else written


def _read_ahead(threads: _Threads, job: Job, todo: Iterable[str | Clip], count: int) -> Iterator[Read | Entry | Clip]:
    """Yield images and frames as they were asked for; a clip comes after its last frame."""
    waiting: deque[Future[Read | Entry] | Future[Read | None] | Clip] = deque()
    for one in todo:
        if isinstance(one, Clip):
            while not one.ended:
                waiting.append(threads.reel.submit(one.read))
                if len(waiting) > count:
                    yield from _read(waiting.popleft())
            waiting.append(one)
        else:
            waiting.append(threads.pool.submit(job.read, one))
        if len(waiting) > count:
            yield from _read(waiting.popleft())
    while waiting:
        yield from _read(waiting.popleft())


def _read(one: "Future[Read | Entry] | Future[Read | None] | Clip") -> Iterator[Read | Entry | Clip]:
    found = one if isinstance(one, Clip) else one.result()
    if found is not None:
        yield found


def _batches(read: Iterator[Read | Entry | Clip], batch_size: int) -> Iterator[list[Read | Entry | Clip]]:
    """Lists with `batch_size` readable images each, and the failures between."""
    batch: list[Read | Entry | Clip] = []
    good = 0
    for image in read:
        batch.append(image)
        good += isinstance(image, Read)
        if good == batch_size or len(batch) >= 4 * batch_size:
            yield batch
            batch, good = [], 0
    if batch:
        yield batch
