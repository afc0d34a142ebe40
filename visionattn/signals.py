"""Ending at a signal with nothing lost: SIGTERM, which a cluster sends, is treated as Ctrl-C is.

A signal raises `Stopped`, which ends the process with 128 + its number after every `finally` has run. Between `hold`
and `release` the first one waits to be asked for by `received`, so that a step is never left half done.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

TERMINATE = signal.SIGTERM
_SIGNALS = (TERMINATE, signal.SIGINT)


class Stopped(SystemExit):
    """The process was told to end."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class _State:
    held = False
    received: int | None = None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raise `Stopped` at a signal; on leaving, handlers are as they were."""
    if threading.current_thread() is not threading.main_thread():  # signals come to the main thread only
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    install()
    try:
        yield
    finally:
        release()
        for number, handler in before.items():
            signal.signal(number, handler)


def install() -> None:
    """Take the signals; again, where a library has taken them meanwhile."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _handle)


def hold() -> None:
    """Let the next signal wait."""
    _State.held = True


def release() -> None:
    """Signals raise again; one that waits is dropped."""
    _State.held, _State.received = False, None


def received() -> int | None:
    """The signal that waits."""
    return _State.received


def leave_to_parent() -> None:
    """In a worker process: Ctrl-C is for the parent, which then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.held and _State.received is None:
        _State.received = number
    else:  # at once; a second one always
        raise Stopped(number)
