"""The code that exports one JPEG from the command line is spread over few files of the package."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

import visionattn

MAX_FILES = 28
TRACE = """
import sys, threading
from pathlib import Path
from visionattn.cli import main

root, called = Path(sys.argv[1]), set()

def profile(frame, event, argument):
    file = frame.f_code.co_filename
    if event != "call" or not file.startswith(str(root)) or frame.f_code.co_name == "<module>":
        return
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return  # code that runs during an import does not count
        frame = frame.f_back
    called.add(Path(file).relative_to(root).as_posix())

threading.setprofile(profile)
sys.setprofile(profile)
code = main(sys.argv[2:])
sys.setprofile(None)
print("called:", *sorted(called))
sys.exit(code)
"""


def test_the_export_of_one_image_runs_code_of_few_files(tmp_path):
    picture = np.random.default_rng(0).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "a.jpg")
    command = ["overlay", "--images", "a.jpg", "--out", "out", "--model", "test_vit", "--weights", "random"]
    package = str(Path(visionattn.__file__).parent)
    done = subprocess.run(
        [sys.executable, "-c", TRACE, package, *command, "--method", "rollout"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    called = done.stdout.rpartition("called: ")[2].split()
    assert {"cli.py", "data/decode.py", "capture/survey.py", "drawing/overlay.py"} <= set(called)
    assert len(called) <= MAX_FILES, called
