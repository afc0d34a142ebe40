"""From a data set to batches, by processes that may die, hang or meet a file that cannot be read."""

import contextlib
import itertools
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch.utils.data import DataLoader, Dataset, get_worker_info

from visionattn.errors import DataError, UsageError
from visionattn.signals import leave_to_parent

Unreadable = Literal["stop", "skip"]
PATIENCE = 20.0
"""Seconds that one image may take."""

_POLL = 2.0  # seconds between two looks at the workers while no batch comes


@dataclass(frozen=True)
class Failure:
    """Stands in the place of a sample that could not be made."""

    path: str
    error: DataError | UsageError

    def __str__(self) -> str:
        return str(self.error)


class Loader(DataLoader[dict[str, Any]]):
    """A DataLoader that names the file when a sample fails, or the process that makes it dies or hangs.

    torch tells of a dead worker by its process id, wherever the main process stands at that moment, and waits for a
    hung one for ever.

    Args:
        dataset: of samples that are dicts; a `path_of(index)` names them.
        collate: joins samples to a batch.
        patience: seconds that one sample may take in a worker.
        unreadable: stop at such a sample, or skip it.
        fill: let others of its batch stand in for a skipped sample, so that batches keep their size.
        skipped: where the skipped ones are noted, path → reason.
        starved: give batches without a sample, for a process that got none (see `Share`).
        options: as DataLoader takes them.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        collate: Callable[[Any], dict[str, Any]],
        patience: float = PATIENCE,
        unreadable: Unreadable = "stop",
        fill: bool = False,
        skipped: dict[str, str] | None = None,
        starved: bool = False,
        **options: Any,
    ) -> None:
        workers = options.get("num_workers", 0)
        watched = dataset if isinstance(dataset, _Watched) else _Watched(dataset, workers)
        kept = {"collate_fn": _Collate(collate, fill), "worker_init_fn": _begin, "timeout": _POLL if workers else 0}
        super().__init__(watched, **{**options, **kept})
        self._watched = watched
        self.collate = collate
        self.patience = patience
        self.unreadable = unreadable
        self.fill = fill
        self.skipped = {} if skipped is None else skipped
        self.starved = starved

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        for batch in self._batches():
            failures: list[Failure] = batch.pop("failures", [])
            for failure in failures:
                if self.unreadable == "stop" or isinstance(failure.error, UsageError):
                    raise failure.error
                self._skip(failure)
            if not batch and self.fill:
                raise DataError(f"no image of a whole batch can be read; {failures[0]}")
            if batch:
                yield {key: value[:0] for key, value in batch.items()} if self.starved else batch

    def _batches(self) -> Iterator[dict[str, Any]]:
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
                index, reason = self._watched.dead() if died else self._watched.hung(self.patience)
                if reason is None:
                    continue  # all is well, and slow
                self._watched.kill()
                self._iterator = None
                if self.unreadable == "stop" or index is None:
                    raise DataError(reason) from error
                self._watched.left_out[index] = reason
                sampler: Any = self.batch_sampler
                rest = list(itertools.islice(sampler, done, None))
                batches = self._start(DataLoader(self.dataset, batch_sampler=rest, **self._options()).__iter__)
            else:
                done += 1
                yield item

    def _options(self) -> dict[str, Any]:
        names = ("num_workers", "collate_fn", "pin_memory", "timeout", "worker_init_fn")
        return {name: getattr(self, name) for name in names}

    def _start(self, make: Callable[[], Any]) -> Iterator[Any]:
        """Begin, and let the death of a worker be found where batches are waited for, not by a signal anywhere."""
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
    """A data set that says what is being read by which process, since when."""

    def __init__(self, dataset: Any, workers: int) -> None:
        self.dataset = dataset
        self.left_out: dict[int, str] = {}
        self._slots = multiprocessing.RawArray("q", 3 * max(1, workers))  # index + 1, since when in ns, process

    def __len__(self) -> int:
        return len(self.dataset)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "dataset":
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __getitem__(self, key: Any) -> Any:
        index = int(key[0] if isinstance(key, tuple) else key)
        if index in self.left_out:
            return Failure(self._name(index), DataError(self.left_out[index]))
        worker = get_worker_info()
        if worker is not None:
            self._slots[3 * worker.id : 3 * worker.id + 3] = [index + 1, time.monotonic_ns(), os.getpid()]
        try:
            return self.dataset[key]
        except (DataError, UsageError) as error:
            return Failure(self._name(index), error)
        except Exception as error:
            reason = DataError(f"{self._name(index)} cannot be made a sample: {type(error).__name__}: {error}")
            return Failure(self._name(index), reason)
        finally:
            if worker is not None:
                self._slots[3 * worker.id] = 0

    def __getitems__(self, keys: Sequence[Any]) -> Any:
        many = getattr(self.dataset, "__getitems__", None)  # of data sets that draw a whole batch at once
        return [self[key] for key in keys] if many is None else many(keys)

    def dead(self) -> tuple[int | None, str]:
        """The sample that a dead process was making, and what to say of it."""
        for index, _, process in self._at_work():
            if not _alive(process):
                return index, f"{self._name(index)}: the process that read it died; it may be too large or damaged"
        return None, "a process that loads images died; it may have been killed for want of memory"

    def hung(self, patience: float) -> tuple[int | None, str | None]:
        """The sample that takes longer than `patience` seconds, and what to say of it."""
        now = time.monotonic_ns()
        for index, since, _ in self._at_work():
            if now - since > patience * 1e9:
                return index, f"{self._name(index)}: not read within {patience:g} seconds"
        return None, None

    def _at_work(self) -> Iterator[tuple[int, int, int]]:
        for place in range(0, len(self._slots), 3):
            index, since, process = self._slots[place : place + 3]
            if index:
                yield index - 1, since, process

    def kill(self) -> None:
        """End the processes that load."""
        for place in range(0, len(self._slots), 3):
            if process := self._slots[place + 2]:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
            self._slots[place : place + 3] = [0, 0, 0]

    def _name(self, index: int) -> str:
        name = getattr(self.dataset, "path_of", None)
        return str(name(index)) if name else f"sample {index} of {type(self.dataset).__name__}"


class _Collate:
    def __init__(self, collate: Callable[[Any], dict[str, Any]], fill: bool) -> None:
        self.collate = collate
        self.fill = fill

    def __call__(self, samples: Any) -> dict[str, Any]:
        if isinstance(samples, dict):  # a batch already
            return self.collate(samples)
        failures = [sample for sample in samples if isinstance(sample, Failure)]
        if not failures:
            return self.collate(samples)
        good = [sample for sample in samples if not isinstance(sample, Failure)]
        if good and self.fill:
            good = [good[place % len(good)] for place in range(len(samples))]
        return {**(self.collate(good) if good else {}), "failures": failures}


def _begin(worker: int) -> None:
    leave_to_parent()


def _alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
