"""Share one export among processes, on one machine or on several machines with the same file system.

The first process finds the images and divides them into portions. Every process, the first one included, takes the next
portion as soon as it is free. A shared counter says which portion is next, so nothing is done twice. The other
processes write their entries into journals in the output folder. At the end the first process moves the journals into
the manifest; if it was killed, the next run does so.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta
from typing import Protocol

from visionattn.errors import DataError
from visionattn.overlays.folder.image_export import ImageTask

_TIMEOUT = timedelta(days=30)  # timeout of the store; the first process may need long to find ten million images
_REFRESH = 0.2  # seconds between two exchanges of the counters


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
        rank: of this process; the first process has rank 0.
        size: number of processes.
        trouble: why another process stopped early, e.g. an error or a kill; "" if none did. `wait` sets it.

    Args:
        store: shared by all processes, a `torch.distributed.Store`.
        rank: of this process.
        size: number of processes.
        children: the processes that this one started.
    """

    def __init__(self, store: Store, rank: int, size: int, children: "Sequence[subprocess.Popen[bytes]]" = ()) -> None:
        self.rank, self.size, self.trouble = rank, size, ""
        self._store, self._children = store, children
        self._tally: dict[str, int] = {}
        self._unsent: dict[str, int] = {}
        self._sent = 0.0
        self._lock = threading.Lock()  # the thread that reads videos counts their frames

    def lay_out(self, portions: Iterable[list[ImageTask]]) -> None:
        """Put the images into the store, in portions; called by the first process."""
        count = 0
        for portion in portions:
            self._store.set(f"portion {count}", json.dumps([task.to_dict() for task in portion]))
            count += 1
        self._store.set("portions", str(count))

    def images(self) -> Iterator[ImageTask]:
        """Take one portion after another until none is left, and yield their images.

        Raises:
            DataError: the first process cannot be reached.
        """
        with _reaching():
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
            error: why it had to stop; "" if it did not.

        Raises:
            DataError: the first process cannot be reached.
        """
        self._send()
        with _reaching():
            self._store.set(f"end {self.rank}", error or " ")

    def wait(self) -> Iterator[dict[str, int]]:
        """Yield the sums of the counters until all other processes have ended; then `trouble` is known."""
        left = set(range(1, self.size))
        reasons = []
        while left:
            for rank in sorted(left):
                if self._store.check([f"end {rank}"]):
                    left.discard(rank)
                    reasons.append(self._store.get(f"end {rank}").decode().strip())
                elif len(self._children) >= rank and self._children[rank - 1].poll() is not None:
                    time.sleep(_REFRESH)  # its announcement may still arrive
                    if not self._store.check([f"end {rank}"]):
                        left.discard(rank)
                        code = self._children[rank - 1].returncode
                        reasons.append(
                            f"process {rank} ended with {code}; run the command again to make the missing outputs"
                        )
            self._send()
            yield self._tally
            if left:
                time.sleep(_REFRESH)
        self.trouble = next(filter(None, reasons), "")

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
    except RuntimeError as error:  # torch raises it for a lost connection
        raise DataError(
            "the first process of this export cannot be reached; run the command again to continue"
        ) from error


@contextlib.contextmanager
def gather(devices: int, arguments: Sequence[str]) -> Iterator[Processes | None]:
    """Start processes that run the same command line, or join those of torchrun or another launcher.

    Such a launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as for `torch.distributed`.

    Args:
        devices: number of processes on this machine, each on its own GPU or share of the cores; ignored if a launcher
            has started the processes.
        arguments: the command line after `visionattn`.

    Yields:
        The processes, or None if this process is the only one.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield _join()
        return
    if devices == 1:
        yield None
        return
    from torch.distributed import PrefixStore, TCPStore

    _take_cores(devices)
    store = TCPStore("127.0.0.1", 0, None, True, timeout=_TIMEOUT, wait_for_workers=False)
    common = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "visionattn", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(devices)},
        )
        for rank in range(1, devices)
    ]
    try:
        yield Processes(PrefixStore("visionattn", store), 0, devices, children)
    finally:
        for child in children:
            child.terminate()  # no effect on processes that have exited
        for child in children:
            child.wait()


def _join() -> Processes:
    from torch.distributed import PrefixStore, TCPStore

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _take_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun hosts the store
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        None,
        hosts,
        timeout=_TIMEOUT,
        wait_for_workers=False,
    )
    return Processes(PrefixStore("visionattn", store), rank, size)


def _take_cores(processes: int) -> None:
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
