"""Stop cleanly at a signal: SIGTERM, which clusters send, is handled like Ctrl-C.

A signal raises `Stopped`. The process ends with the exit code 128 + signal number, after every `finally` has run.
Between `hold` and `release`, the first signal is only stored, so that it does not interrupt a training step. `received`
returns the stored signal.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

TERMINATE = signal.SIGTERM
_SIGNALS = (TERMINATE, signal.SIGINT)


class Stopped(SystemExit):
    """A signal asked the process to end.

    Attributes:
        signal: the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class _State:
    held = False
    received: int | None = None


@contextlib.contextmanager
def watched() -> Iterator[None]:
    """Raise `Stopped` at a signal inside the `with` block; on exit, restore the earlier handlers."""
    if threading.current_thread() is not threading.main_thread():  # Python runs handlers in the main thread only
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
    """Set the signal handlers. Call this again after a library has replaced them."""
    if threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            signal.signal(number, _handle)


def hold() -> None:
    """Store the next signal instead of raising `Stopped`."""
    _State.held = True


def release() -> None:
    """Let signals raise `Stopped` again, and forget the stored signal."""
    _State.held, _State.received = False, None


def received() -> int | None:
    """Return the number of the stored signal, or None."""
    return _State.received


def leave_to_parent() -> None:
    """Set the handlers of a worker process: ignore Ctrl-C, since the parent handles it and then ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.held and _State.received is None:
        _State.received = number
    else:  # signals are not held, or this is the second signal
        raise Stopped(number)
