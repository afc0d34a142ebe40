"""A signal ends the process after all `finally` blocks have run. A training step ends before a signal is handled."""

import signal
import subprocess
import sys

import pytest

from visionattn import signals

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", BOTH)
def test_a_signalled_process_exits_with_128_plus_the_signal_after_finally(number):
    code = f"""
import signal
from visionattn import signals
with signals.watched():
    try:
        signal.raise_signal({int(number)})
    finally:
        print("finally ran")
print("never reached")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 128 + number
    assert ended.stdout == "finally ran\n"


def test_a_held_signal_is_stored_and_a_second_one_raises():
    with signals.watched():
        signals.hold()
        assert signals.received() is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received() == signal.SIGTERM
        with pytest.raises(signals.Stopped) as ended:
            signal.raise_signal(signal.SIGINT)
        assert ended.value.code == 130
        signals.release()
        assert signals.received() is None
        with pytest.raises(signals.Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_watched_restores_the_earlier_handlers():
    before = [signal.getsignal(number) for number in BOTH]
    with signals.watched():
        assert [signal.getsignal(number) for number in BOTH] != before
    assert [signal.getsignal(number) for number in BOTH] == before
