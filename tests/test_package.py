"""The built wheel contains all files and works without a checkout; code that mypy checks also runs."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

from tests.conftest import SMALL
from tests.typed_use import use

ROOT = Path(__file__).parents[1]


def test_the_wheel_runs_the_quickstart_without_a_checkout(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path / "dist")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = (tmp_path / "dist").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    shipped = {f"visionattn/{path.relative_to(ROOT).as_posix()}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert shipped < set(names)
    assert "visionattn/py.typed" in names
    page = {f"visionattn/explorer/static/{path.name}" for path in (ROOT / "visionattn/explorer/static").iterdir()}
    assert len(page) > 5
    assert page < set(names)
    assert {f"visionattn/photographs/{path.name}" for path in (ROOT / "data/photographs").iterdir()} < set(names)
    (metadata,) = (tmp_path / "site").glob("*.dist-info")
    assert "visionattn = visionattn.cli:main" in (metadata / "entry_points.txt").read_text()
    text = (metadata / "METADATA").read_text()
    for expected in (
        "Requires-Python: >=3.10",
        "License-Expression: Apache-2.0",
        "Typing :: Typed",
        "Operating System :: POSIX :: Linux",  # and not OS Independent: shards and locks need fcntl
        ":: 3.13",
        "# visionattn",
    ):
        assert expected in text
    (tmp_path / "work").mkdir()
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[10:20, 20:30] = 255
    Image.fromarray(photo).save(tmp_path / "work" / "photo.png")
    arguments = ["overlay", "--images", "photo.png", "--out", "seen", "--model", "test_vit", "--weights", "random"]
    code = f"""
from visionattn import cli
print(cli.__file__)
print("code", cli.main({["fit", "--config", "configs/quickstart.yaml", *SMALL]}))
print("code", cli.main({arguments}))
print("code", cli.main(["overlay", "--demo"]))
"""
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "work", env=environment, capture_output=True, text=True, check=True
    )
    assert run.stdout.startswith(str(tmp_path / "site"))
    assert run.stdout.count("code 0\n") == 3
    assert (tmp_path / "work" / "runs" / "quickstart" / "0" / "overlays" / "test.png").stat().st_size > 10_000
    with Image.open(tmp_path / "work" / "seen" / "photo.png.overlay.jpg") as overlay:
        assert overlay.size == (60, 40)
    assert (tmp_path / "work" / "visionattn-demo" / "chelsea.jpg.overlay.jpg").is_file()


def test_typed_example_code_runs(tmp_path):
    nn = torch.nn
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sigmoid(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    nn.init.ones_(model[-1].weight)  # with random weights the Grad-CAM map could be zero
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 32, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    use(model, tmp_path / "a.png", tmp_path)
    assert (tmp_path / "page.html").stat().st_size > 10_000


def test_ci_runs_on_every_python_that_the_package_supports():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    checks = workflow["jobs"]["checks"]
    supported = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert checks["strategy"]["matrix"]["python"] == [*supported, "3.14"]
    assert "== '3.14'" in checks["continue-on-error"]
    assert checks["steps"][-1]["run"] == ".ci/run"
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o100  # it can be executed
