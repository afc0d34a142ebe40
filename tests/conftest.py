"""Data and a trained checkpoint that several tests use; all of it made here."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: threads of several tests would wait for each other

import numpy as np
import pytest

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "--trainer.max_epochs=1",
    "--trainer.enable_progress_bar=false",
    "--data.train_size=256",
    "--data.val_size=64",
    "--data.test_size=64",
]
"""Flags that make the quickstart a matter of seconds."""


@pytest.fixture(autouse=True)
def _fresh_run(monkeypatch):
    monkeypatch.delenv("VISIONATTN_RUN", raising=False)
    yield
    os.environ.pop("VISIONATTN_RUN", None)


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """The folder of a short run of the quickstart, with its checkpoints, config and report."""
    from visionattn.cli import main

    home = tmp_path_factory.mktemp("quick")
    before = Path.cwd()
    os.chdir(home)
    try:
        assert main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), *SMALL]) == 0
    finally:
        os.chdir(before)
        os.environ.pop("VISIONATTN_RUN", None)
    return home / "runs" / "quickstart" / "0"


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """A folder of five classes, twelve small pictures each, every class with its own colour."""
    from PIL import Image

    root = tmp_path_factory.mktemp("photos")
    random = np.random.default_rng(0)
    for number in range(5):
        folder = root / f"class{number}"
        folder.mkdir()
        for index in range(12):
            colour = random.integers(0, 60, (40, 48, 3)) + np.array([number * 40, 100, 200 - number * 40]) % 195
            Image.fromarray(colour.astype(np.uint8)).save(folder / f"{index}.png")
    return root
