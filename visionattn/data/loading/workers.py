"""A DataLoader whose errors name the file of a failed sample, and which detects workers that died or hang."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from torch.utils.data import DataLoader, Dataset, get_worker_info

from visionattn.data.samples import Batch, Sample
from visionattn.errors import DataError, UsageError
from visionattn.signals import leave_to_parent

Unreadable = Literal["stop", "skip"]
WORKER_TIMEOUT = 20.0
"""Default time limit of a worker for one image, in seconds."""

_POLL = 2.0  # seconds to wait for a batch before the workers are checked

Key: TypeAlias = "int | tuple[int, int]"
"""Index of a sample, or (index, seed of its augmentation)."""


@dataclass(frozen=True)
class Failure:
    """The result for a sample that could not be loaded."""

    path: str
    error: DataError | UsageError

    def __str__(self) -> str:
        return str(self.error)


class _Loaded(NamedTuple):
    """A batch (None if all its samples failed) and the failures; a tuple, because torch pins the memory of tuples."""

    batch: Batch | None
    failures: list[Failure]


@dataclass(frozen=True)
class _Whole:
    """A complete batch that a data set returned, which needs no collating."""

    batch: Batch


class Loader(DataLoader[Batch]):
    """A DataLoader whose error names the file if a sample fails, or if the worker that loads it dies or hangs.

    PyTorch's own loader reports only the process id of a dead worker, and raises the error at an arbitrary point of the
    main process. For a worker that hangs, PyTorch's loader waits forever.

    Args:
        dataset: returns samples, which are dicts. Its optional method `path_of(index)` gives the name used in errors.
        collate: joins samples into a batch.
        worker_timeout: seconds that a worker may take for one sample (default: 20).
        unreadable: what to do if a sample fails: `stop` or `skip` (default: stop).
        fill: replace skipped samples by copies of other samples of the batch, so that batches keep their size
            (default: False).
        skipped: dict path → reason, to which skipped samples are added.
        starved: yield empty batches, for a process without samples, see `RankSampler` (default: False).
        options: other arguments of DataLoader.

    Raises:
        DataError: during iteration, if a sample fails and `unreadable` is `stop`, or if all samples of a batch fail and
            `fill` is set.
        UsageError: during iteration, if loading a sample raises UsageError.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        collate: Callable[[Sequence[Sample]], Batch],
        worker_timeout: float = WORKER_TIMEOUT,
        unreadable: Unreadable = "stop",
        fill: bool = False,
        skipped: dict[str, str] | None = None,
        starved: bool = False,
        **options: Any,
    ) -> None:
        workers = options.get("num_workers", 0)
        watched = dataset if isinstance(dataset, _Watched) else _Watched(dataset, workers)
        own = {"collate_fn": _Collate(collate, fill), "worker_init_fn": _begin, "timeout": _POLL if workers else 0}
        super().__init__(cast(Dataset[Batch], watched), **{**options, **own})
        self._watched = watched
        self.collate = collate
        self.worker_timeout = worker_timeout
        self.unreadable = unreadable
        self.fill = fill
        self.skipped = {} if skipped is None else skipped
        self.starved = starved

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch annotates a class of its own
        for batch, failures in self._loaded():
            for failure in failures:
                if self.unreadable == "stop" or isinstance(failure.error, UsageError):
                    raise failure.error
                self._skip(failure)
            if not batch and self.fill:
                raise DataError(f"none of the images of a batch can be read, e.g. {failures[0]}")
            if batch:
                yield _without_samples(batch) if self.starved else batch

    def _loaded(self) -> Iterator[_Loaded]:
        done = 0
        batches = self._start(super().__iter__)
        while True:
            try:
                item = next(batches)
            except StopIteration:
                return
            except RuntimeError as error:
                died = "exited unexpectedly" in str(error)
                if not died and "timed out" not in str(error):
                    raise
                index, reason = self._watched.dead() if died else self._watched.hung(self.worker_timeout)
                if reason is None:
                    continue  # every worker is within the time limit, so wait for the batch
                self._watched.kill()
                self._iterator = None
                if self.unreadable == "stop" or index is None:
                    raise DataError(reason) from error
                self._watched.left_out[index] = reason
                rest = list(itertools.islice(cast(Iterable[list[int]], self.batch_sampler), done, None))
                batches = self._start(DataLoader(self.dataset, batch_sampler=rest, **self._options()).__iter__)
            else:
                done += 1
                yield item

    def _options(self) -> dict[str, Any]:
        names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn")
        return {name: getattr(self, name) for name in names}

    def _start(self, make: Callable[[], Iterator[Any]]) -> Iterator[_Loaded]:
        """Start the workers, then restore the SIGCHLD handler that torch replaces; `_loaded` handles dead workers."""
        if threading.current_thread() is not threading.main_thread():
            return make()
        before = signal.getsignal(signal.SIGCHLD)
        try:
            return make()
        finally:
            signal.signal(signal.SIGCHLD, before)

    def _skip(self, failure: Failure) -> None:
        if failure.path not in self.skipped:
            self.skipped[failure.path] = str(failure)
            print(f"left out: {failure}", file=sys.stderr)


class _Watched(Dataset[Any]):
    """A data set that records in shared memory which process is reading which sample, and since when."""

    def __init__(self, dataset: Any, workers: int) -> None:  # dataset: any data set, perhaps with the optional methods
        self.dataset = dataset
        self.left_out: dict[int, str] = {}
        # three numbers per worker: index + 1 of the sample (0: none), start in ns, process id
        self._slots = multiprocessing.RawArray("q", 3 * max(1, workers))

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:  # forwards all other attributes to the data set
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, key: Key) -> Sample | Failure:
        index = int(key[0] if isinstance(key, tuple) else key)
        if index in self.left_out:
            return Failure(self._name(index), DataError(self.left_out[index]))
        worker = get_worker_info()
        if worker is not None:
            self._slots[3 * worker.id : 3 * worker.id + 3] = [index + 1, time.monotonic_ns(), os.getpid()]
        try:
            return cast(Sample, self.dataset[key])
        except (DataError, UsageError) as error:
            return Failure(self._name(index), error)
        except Exception as error:
            reason = DataError(f"{self._name(index)} cannot be loaded: {type(error).__name__}: {error}")
            return Failure(self._name(index), reason)
        finally:
            if worker is not None:
                self._slots[3 * worker.id] = 0

    def __getitems__(self, keys: Sequence[Key]) -> "list[Sample | Failure] | _Whole":
        make_batch = getattr(self.dataset, "__getitems__", None)  # some data sets return a complete batch
        return [self[key] for key in keys] if make_batch is None else _Whole(make_batch(keys))

    def dead(self) -> tuple[int | None, str]:
        """Return the index of the sample that a dead worker was reading (None if unknown), and the error message."""
        for index, _, process in self._at_work():
            if not _alive(process):
                reason = "the process that read this image died; the image may be too large or damaged"
                return index, f"{self._name(index)}: {reason}"
        return None, "a process that loads images died; the system may have been out of memory"

    def hung(self, worker_timeout: float) -> tuple[int | None, str | None]:
        """Return the index of a sample that exceeds the time limit, and the error message, or (None, None)."""
        now = time.monotonic_ns()
        for index, since, _ in self._at_work():
            if now - since > worker_timeout * 1e9:
                return index, f"{self._name(index)}: not read within {worker_timeout:g} seconds"
        return None, None

    def _at_work(self) -> Iterator[tuple[int, int, int]]:
        for place in range(0, len(self._slots), 3):
            index, since, process = self._slots[place : place + 3]
            if index:
                yield index - 1, since, process

    def kill(self) -> None:
        """Kill the workers."""
        for place in range(0, len(self._slots), 3):
            if process := self._slots[place + 2]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._slots[place : place + 3] = [0, 0, 0]

    def _name(self, index: int) -> str:
        name = getattr(self.dataset, "path_of", None)
        return str(name(index)) if name else f"sample {index} of {type(self.dataset).__name__}"


class _Collate:
    """Collate the samples that did not fail. This is a class because workers need a callable that can be pickled."""

    def __init__(self, collate: Callable[[Sequence[Sample]], Batch], fill: bool) -> None:
        self.collate = collate
        self.fill = fill

    def __call__(self, samples: "Sequence[Sample | Failure] | _Whole") -> _Loaded:
        if isinstance(samples, _Whole):
            return _Loaded(samples.batch, [])
        failures = [sample for sample in samples if isinstance(sample, Failure)]
        good = [sample for sample in samples if not isinstance(sample, Failure)]
        if failures and good and self.fill:
            good = [good[place % len(good)] for place in range(len(samples))]
        return _Loaded(self.collate(good) if good else None, failures)


def _without_samples(batch: Batch) -> Batch:
    return cast(Batch, {key: cast(Sequence[object], value)[:0] for key, value in batch.items()})


def _begin(worker: int) -> None:
    leave_to_parent()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
