"""Signals end what runs, at a moment at which nothing is lost."""

import signal
import subprocess
import sys

import pytest

from visionattn import signals

BOTH = (signal.SIGTERM, signal.SIGINT)


@pytest.mark.parametrize("number", BOTH)
def test_a_process_ends_with_128_and_the_number_after_its_last_words(number):
    code = f"""
import signal
from visionattn import signals
with signals.watched():
    try:
        signal.raise_signal({int(number)})
    finally:
        print("last words")
print("never reached")
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 128 + number
    assert ended.stdout == "last words\n"


def test_the_first_signal_waits_while_it_is_held_and_a_second_one_does_not():
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


def test_handlers_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in BOTH]
    with signals.watched():
        assert [signal.getsignal(number) for number in BOTH] != before
    assert [signal.getsignal(number) for number in BOTH] == before
