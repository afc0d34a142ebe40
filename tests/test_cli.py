"""The command line as a user meets it."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from visionattn.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


def run_python(code, folder):
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_help_is_quick_and_imports_no_torch(tmp_path):
    code = "import sys; from visionattn.cli import main; main(['--help']); print('torch' in sys.modules, 'numpy' in sys.modules)"
    started = time.perf_counter()
    result = run_python(code, tmp_path)
    assert time.perf_counter() - started < 1
    assert result.stdout.splitlines()[-1] == "False False"
    for verb in ("fit", "validate", "test", "predict", "overlay"):
        assert f"  {verb} " in result.stdout


def test_importing_the_package_imports_nothing_heavy(tmp_path):
    result = run_python("import sys, visionattn; print({'torch', 'numpy', 'cv2', 'lightning'} & set(sys.modules))", tmp_path)
    assert result.stdout.strip() == "set()"
