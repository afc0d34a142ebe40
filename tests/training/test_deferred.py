"""Test, in a process of its own, that packages that torchmetrics imports are loaded only when they are used."""

import subprocess
import sys

import pytest

CODE = """
import sys
from visionattn.commands import train
train.parser("fit")
assert "torchmetrics" in sys.modules
print([name for name in ("transformers", "scipy.signal") if name in sys.modules])

import scipy.signal
assert scipy.signal.get_window("hann", 4).tolist() == [0, 0.5, 1, 0.5]
from torchmetrics.functional.text import bert
import transformers
for stand_in, real in ((bert.AutoTokenizer, transformers.AutoTokenizer), (bert.AutoModel, transformers.AutoModel)):
    assert stand_in is not real and stand_in.from_pretrained.__func__ is real.from_pretrained.__func__
assert isinstance(transformers.AutoTokenizer, type) and not isinstance(0, bert.AutoTokenizer)
"""


def test_transformers_and_scipy_signal_are_loaded_only_when_they_are_used():
    pytest.importorskip("transformers")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
