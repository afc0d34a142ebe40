"""The way of images through an export: read, explain, draw and write at the same time.

Threads read images and draw overlays while models work on the batches between, and others wait for the disk; OpenCV and
Pillow let go of the interpreter's lock for all that takes long.
"""

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from typing import Any, TypeAlias

from visionattn.errors import DataError
from visionattn.maps.base import MapWarning
from visionattn.overlay.clips import Clip, is_video
from visionattn.overlay.explainers import Explain, explainers
from visionattn.overlay.job import Explained, Job, Read, Written
from visionattn.overlay.manifest import Journal, Manifest
from visionattn.overlay.team import Team

_WAITERS = 8  # threads that wait for the disk; those that wait together are served together

Entry: TypeAlias = dict[str, Any]
Pending: TypeAlias = "Future[Entry] | Future[None] | Entry"
"""An entry, one that is being made, or a frame whose video has none yet."""


def run(
    job: Job,
    team: Team,
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
        with explainers(job) as (count, explain), warnings.catch_warnings():
            warnings.simplefilter("ignore", MapWarning)  # that a heatmap is constant is told in the manifest
            read = _batches(_read_ahead(threads, job, todo, 2 * batch_size), -(-batch_size // count))
            for batch, explained in _explained(read, count, explain):
                good = [image for image in batch if isinstance(image, Read)]
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


def _explained(
    batches: Iterator[list[Read | Entry | Clip]], count: int, explain: Explain
) -> Iterator[tuple[list[Read | Entry | Clip], list[Explained | Entry]]]:
    """Yield batches in their order, with what was found in their readable images; so many are explained at once."""
    waiting: deque[tuple[list[Read | Entry | Clip], Future[list[Explained | Entry]]]] = deque()
    for batch in batches:
        waiting.append((batch, explain([image for image in batch if isinstance(image, Read)])))
        if len(waiting) > count or count == 1:  # one more waits, so that no thread does
            batch, found = waiting.popleft()
            yield batch, found.result()
    for batch, found in waiting:
        yield batch, found.result()


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
