"""Without pyarrow, one sentence says how to install it."""

import subprocess
import sys


def test_without_pyarrow_the_error_names_the_extra():
    code = """
import sys
sys.modules["pyarrow"] = None  # its import fails
from visionattn.batches import Explainer
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "visionattn.batches needs pyarrow: pip install 'visionattn[parquet]'" in done.stderr.splitlines()[-1]
