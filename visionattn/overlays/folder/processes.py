"""One export shared by processes, on one machine or several that see the same files.

The first process finds the images and lays them out in portions; each process, the first too, takes the next portion as
soon as it is free. Nothing is done twice, since a counter that all share says which portion is next. What the others
made they write into journals beside the manifest; at the end the first one takes those in, or, where it was killed, the
next run does.
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
from typing import Any

from visionattn.errors import DataError

_PATIENCE = timedelta(days=30)  # finding ten million images takes a while
_REFRESH = 0.2  # seconds between two looks at what the others have done


class Team:
    """The processes of an export.

    Attributes:
        trouble: why another process had to stop, or that it was killed; known once all were waited for.

    Args:
        store: what they share, a `torch.distributed.Store`.
        rank: of this one; 0 leads.
        size: how many there are.
        children: those that this one started.
    """

    def __init__(self, store: Any, rank: int, size: int, children: "Sequence[subprocess.Popen[bytes]]" = ()) -> None:
        self.rank, self.size, self.trouble = rank, size, ""
        self._store, self._children = store, children
        self._tally: dict[str, int] = {}
        self._unsent: dict[str, int] = {}
        self._sent = 0.0
        self._lock = threading.Lock()  # frames of videos are counted by the thread that reads them

    def give(self, portions: Iterable[list[dict[str, Any]]]) -> None:
        """Lay out the work, plain data; called by the first."""
        count = 0
        for portion in portions:
            self._store.set(f"portion {count}", json.dumps(portion))
            count += 1
        self._store.set("portions", str(count))

    def share(self) -> Iterator[dict[str, Any]]:
        """Take one portion after another until there is no more."""
        with _reaching():
            count = int(self._store.get("portions"))
        while True:
            with _reaching():
                number = self._store.add("next", 1) - 1
                if number >= count:
                    return
                portion = json.loads(self._store.get(f"portion {number}"))
                self._store.delete_key(f"portion {number}")
            yield from portion

    def tally(self, **counts: int) -> dict[str, int]:
        """Add to what all have counted, and tell the sums; other processes' may be old by a fifth of a second."""
        with self._lock:
            for name, count in counts.items():
                self._tally[name] = self._tally.get(name, 0) + count
                self._unsent[name] = self._unsent.get(name, 0) + count
        if time.monotonic() - self._sent > _REFRESH:
            self._send()
        return self._tally

    def finish(self, error: str = "") -> None:
        """This process has done its share, or had to stop."""
        self._send()
        with _reaching():
            self._store.set(f"end {self.rank}", error or " ")

    def wait(self) -> Iterator[dict[str, int]]:
        """Yield the sums until all others have finished, had to stop, or are dead; see `trouble`."""
        left = set(range(1, self.size))
        reasons = []
        while left:
            for rank in sorted(left):
                if self._store.check([f"end {rank}"]):
                    left.discard(rank)
                    reasons.append(self._store.get(f"end {rank}").decode().strip())
                elif len(self._children) >= rank and self._children[rank - 1].poll() is not None:
                    time.sleep(_REFRESH)  # its last word may be on its way
                    if not self._store.check([f"end {rank}"]):
                        left.discard(rank)
                        code = self._children[rank - 1].returncode
                        reasons.append(
                            f"process {rank} ended with {code}; run the command again, to make what is missing"
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
    except RuntimeError as error:  # torch's, of a connection
        raise DataError(
            "the process that leads this export cannot be reached; run the command again, it goes on where it was"
        ) from error


@contextlib.contextmanager
def gather(devices: int, arguments: Sequence[str]) -> Iterator[Team | None]:
    """Start processes that run the same command line, or join those that torchrun or another launcher has started.

    Such a launcher sets RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT, as it does for `torch.distributed`.

    Args:
        devices: processes on this machine, where no launcher says otherwise; each takes a GPU of its own, or its share
            of the cores.
        arguments: of the command line.

    Yields:
        The processes; None where this one is alone.
    """
    if {"RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        yield _join()
        return
    if devices == 1:
        yield None
        return
    from torch.distributed import PrefixStore, TCPStore

    _take_cores(devices)
    store = TCPStore("127.0.0.1", 0, None, True, timeout=_PATIENCE, wait_for_workers=False)
    common = {"WORLD_SIZE": str(devices), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    children = [
        subprocess.Popen(
            [sys.executable, "-m", "visionattn", *arguments],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(devices)},
        )
        for rank in range(1, devices)
    ]
    try:
        yield Team(PrefixStore("visionattn", store), 0, devices, children)
    finally:
        for child in children:
            child.terminate()  # of those that have finished, nothing
        for child in children:
            child.wait()


def _join() -> Team:
    from torch.distributed import PrefixStore, TCPStore

    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _take_cores(int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"  # else torchrun's agent does
    store = TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        None,
        hosts,
        timeout=_PATIENCE,
        wait_for_workers=False,
    )
    return Team(PrefixStore("visionattn", store), rank, size)


def _take_cores(processes: int) -> None:
    import torch

    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // processes))
