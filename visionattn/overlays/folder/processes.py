"""Share one export among processes, on one machine or on several machines with the same file system.

The first process finds the images and divides them into portions. Every process, the first one included, takes the next
portion as soon as it is free. A shared counter says which portion is next, so nothing is done twice. The other
processes write their entries into journals in the output folder. At the end the first process moves the journals into
the manifest, and makes the outputs of processes that were killed or are silent. If the first process is killed, the
others end, and the next run moves the journals.

Each process adds to a counter of its own in the shared store, as a sign of life. A process is silent if its counter
has not changed for some minutes: its machine or its network has failed, or it was stopped.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Protocol

from visionattn.errors import DataError, UsageError
from visionattn.overlays.folder.image_export import ImageTask
from visionattn.overlays.folder.launch import Place, launched

_REFRESH = 0.2  # seconds between two updates of the shared counters
_BEAT = 5.0  # seconds between two signs of life
_SILENCE = 180.0  # seconds without a sign of life after which a process counts as lost
_JOIN = 600.0  # seconds to wait for the first process; tasks of a cluster may start at different times
_ANSWER = timedelta(minutes=1)  # time in which the store must answer
_CHILD = "VISIONATTN_CHILD"  # environment variable of processes that `gather` has started


class Store(Protocol):
    """The methods of `torch.distributed.Store` that the processes of an export use."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def add(self, key: str, amount: int, /) -> int: ...

    def check(self, keys: list[str], /) -> bool: ...

    def delete_key(self, key: str, /) -> bool: ...


class Processes:
    """The processes of an export.

    Attributes:
        rank: rank of this process; the first process has rank 0.
        size: number of processes.
        trouble: the error that stopped another process; "" if there was none. `wait` sets it.
        lost: why each process that was killed or is silent made no more outputs. `wait` sets it.

    Args:
        store: a `torch.distributed.Store` that all processes share.
        rank: rank of this process.
        size: number of processes.
        children: the processes that this process started.
    """

    def __init__(self, store: Store, rank: int, size: int, children: "Sequence[subprocess.Popen[bytes]]" = ()) -> None:
        self.rank, self.size, self.trouble = rank, size, ""
        self.lost: list[str] = []
        self._portions = 0
        # rank → its number of signs of life, and when this number changed
        self._last_seen: dict[int, tuple[int, float]] = {}
        self._store, self._children = store, children
        self._tally: dict[str, int] = {}
        self._unsent: dict[str, int] = {}
        self._sent = 0.0
        self._lock = threading.Lock()  # the thread that reads videos also calls `tally`

    def lay_out(self, portions: Iterable[list[ImageTask]]) -> None:
        """Put the images into the store, in portions; called by the first process.

        A second call adds portions after all earlier ones were taken.
        """
        first = self._portions
        for portion in portions:
            self._store.set(f"portion {self._portions}", json.dumps([task.to_dict() for task in portion]))
            self._portions += 1
        self._store.set("next", str(first))
        self._store.set("portions", str(self._portions))
        for rank in range(1, self.size):
            self._is_silent(rank)  # from now on, a process that never joins is silent

    def images(self) -> Iterator[ImageTask]:
        """Take one portion after another until none is left, and yield their images.

        Raises:
            DataError: the first process cannot be reached, or is silent.
        """
        with _reaching():
            while not self._store.check(["portions"]):  # waiting here and not in the store lets signals end the process
                if self._is_silent(0):
                    raise DataError(f"the first process of this export {_silent()}; run the command again to continue")
                time.sleep(_REFRESH)
            count = int(self._store.get("portions"))
        while True:
            with _reaching():
                number = self._store.add("next", 1) - 1
                if number >= count:
                    return
                portion = json.loads(self._store.get(f"portion {number}"))
                self._store.delete_key(f"portion {number}")
            yield from map(ImageTask.from_dict, portion)

    def tally(self, **counts: int) -> dict[str, int]:
        """Add to the counters and return the sums over all processes; the others' counts are up to 0.2 s old."""
        with self._lock:
            for name, count in counts.items():
                self._tally[name] = self._tally.get(name, 0) + count
                self._unsent[name] = self._unsent.get(name, 0) + count
        if time.monotonic() - self._sent > _REFRESH:
            self._send()
        return self._tally

    def finish(self, error: str = "") -> None:
        """Announce that this process has done its work.

        Args:
            error: the error that stopped this process; "" if there was none.

        Raises:
            DataError: the first process cannot be reached.
        """
        self._send()
        with _reaching():
            self._store.set(f"end {self.rank}", error or " ")

    def wait(self) -> Iterator[dict[str, int]]:
        """Yield the sums of the counters until all other processes have ended or are lost; set `trouble` and `lost`."""
        left = set(range(1, self.size))
        while left:
            for rank in sorted(left):
                end = self._end(rank)
                if end is not None:
                    left.discard(rank)
                    self.trouble = self.trouble or end
                elif reason := self._loss(rank):
                    left.discard(rank)
                    self.lost.append(reason)
            self._send()
            yield self._tally
            if left:
                time.sleep(_REFRESH)

    @contextlib.contextmanager
    def alive(self) -> Iterator["Processes"]:
        """Give signs of life inside a `with` block.

        A process other than the first ends if the store is silent, see `_ending_in_silence`.
        """
        done, answered = threading.Event(), [time.monotonic()]

        def beat() -> None:
            while True:
                try:
                    self._store.add(f"beat {self.rank}", 1)
                    for rank in range(1, self.size) if self.rank == 0 else ():
                        self._is_silent(rank)
                except RuntimeError:
                    return  # the other thread of this process gets this error too
                answered[0] = time.monotonic()
                if done.wait(_BEAT):
                    return

        threading.Thread(target=beat, daemon=True).start()
        try:
            with _ending_in_silence(answered) if self.rank else contextlib.nullcontext():
                yield self
        finally:
            done.set()

    def _end(self, rank: int) -> str | None:
        """Return the error with which a process has ended, "" if there was none, or None if the process still runs."""
        if not self._store.check([f"end {rank}"]):
            return None
        return self._store.get(f"end {rank}").decode().strip()

    def _loss(self, rank: int) -> str:
        """Return why a process makes no more outputs, or "" if it is at work."""
        child = self._children[rank - 1] if len(self._children) >= rank else None
        if child is not None and child.poll() is not None:
            time.sleep(_REFRESH)  # the child may have announced its end just before it exited
            return "" if self._end(rank) is not None else f"process {rank} ended with {child.returncode}"
        if not self._is_silent(rank):
            return ""
        if child is not None:
            child.kill()
        return f"process {rank} {_silent()}"

    def _is_silent(self, rank: int) -> bool:
        """Return whether a process gave no sign of life for `_SILENCE` seconds; the first call starts the clock."""
        now, beats = time.monotonic(), self._store.add(f"beat {rank}", 0)
        before, since = self._last_seen.setdefault(rank, (beats, now))
        if beats != before:
            self._last_seen[rank] = beats, now
            return False
        return now - since > _SILENCE

    def _send(self) -> None:
        self._sent = time.monotonic()
        with self._lock, _reaching():
            for name, count in self._unsent.items():
                self._tally[name] = self._store.add(f"sum {name}", count)
            self._unsent = dict.fromkeys(self._unsent, 0)


@contextlib.contextmanager
def _reaching() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch raises a RuntimeError for a lost connection
        raise DataError(
            "the first process of this export cannot be reached; run the command again to continue"
        ) from error


@contextlib.contextmanager
def _ending_in_silence(answered: list[float]) -> Iterator[None]:
    """Exit with code 1 if the store does not answer for `_SILENCE` seconds inside this context.

    The store gives no error if the process that serves it is stopped, or its machine is silent.

    Args:
        answered: holds the time of the store's last answer, which other threads set, by `time.monotonic`.
    """
    done = threading.Event()

    def watch() -> None:
        while not done.wait(min(_BEAT, _SILENCE / 4)):
            if time.monotonic() - answered[0] > _SILENCE:
                print(f"error: the first process of this export {_silent()}", file=sys.stderr, flush=True)
                os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        done.set()


def _silent() -> str:
    return f"has given no sign of life for {_SILENCE:.0f} s"


@contextlib.contextmanager
def gather(devices: int, arguments: Sequence[str]) -> Iterator[Processes | None]:
    """Start processes that run the same command line, or join the processes of a launcher: torchrun or srun.

    Args:
        devices: number of processes on this machine, each on its own GPU or share of the cores; ignored if a launcher
            has started the processes.
        arguments: the command line after `visionattn`.

    Yields:
        The processes, or None if this process is the only one.

    Raises:
        UsageError: a variable of the launcher is wrong, see `launch.launched`, or its port is in use.
        DataError: the first process does not begin within ten minutes.
    """
    place = launched()
    if place is not None:
        with _join(place).alive() as processes:
            yield processes
        return
    if devices == 1:
        yield None
        return
    from torch.distributed import PrefixStore, TCPStore

    _take_cores(devices)
    store = TCPStore("127.0.0.1", 0, None, True, timeout=_ANSWER, wait_for_workers=False)
    common = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), _CHILD: "1"}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "visionattn", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(devices)},
            stdin=subprocess.PIPE,  # closed when this process ends, also after a kill; see `_end_with_parent`
        )
        for rank in range(1, devices)
    ]
    try:
        with Processes(PrefixStore("visionattn", store), 0, devices, children).alive() as processes:
            yield processes
    finally:
        for child in children:
            child.terminate()  # no effect on processes that have exited
        for child in children:
            try:
                child.wait(_BEAT)
            except subprocess.TimeoutExpired:  # e.g. a process that was stopped
                child.kill()
                child.wait()
            assert child.stdin is not None
            child.stdin.close()


def _join(place: Place) -> Processes:
    from torch.distributed import PrefixStore, TCPStore

    if _CHILD in os.environ:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    _take_cores(place.local_size)
    if not place.hosts:
        _wait_for(place)
    try:
        with contextlib.nullcontext() if place.hosts else _ending_in_silence([time.monotonic()]):
            store = TCPStore(place.address, place.port, None, place.hosts, timeout=_ANSWER, wait_for_workers=False)
    except RuntimeError as error:
        raise UsageError(
            f"the processes of this export cannot meet at {place.address}, port {place.port} "
            f"({str(error).splitlines()[0]}); set MASTER_PORT to a free port"
        ) from error
    return Processes(PrefixStore(f"visionattn{place.name}", store), place.rank, place.size)


def _wait_for(place: Place) -> None:
    """Wait until the store can be reached. Waiting here and not in torch lets signals end the process.

    Raises:
        DataError: the store cannot be reached within `_JOIN` seconds.
    """
    end = time.monotonic() + _JOIN
    while True:
        try:
            socket.create_connection((place.address, place.port), timeout=_BEAT).close()
            return
        except OSError as error:
            if time.monotonic() > end:
                raise DataError(
                    f"the first process of this export cannot be reached at {place.address}, port {place.port} "
                    f"({error.strerror or error}); start all processes at the same time"
                ) from error
            time.sleep(_REFRESH)


def _end_with_parent() -> None:
    """End this process when the process that started it has ended, which closes the stdin of this process."""
    with contextlib.suppress(OSError):
        while os.read(0, 4096):
            pass
    os.kill(os.getpid(), signal.SIGTERM)  # a clean end, if the main thread runs Python code …
    time.sleep(_BEAT)
    os._exit(128 + signal.SIGTERM)  # … and an end in any case


def _take_cores(processes: int) -> None:
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
