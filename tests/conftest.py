"""Fixtures of several tests: a trained checkpoint, pictures, a browser and a copy of the Hugging Face hub."""

import os
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # set before torch is imported; threads of parallel tests slow each other down

import multiprocessing
import shutil
from unittest import mock

import huggingface_hub
import numpy as np
import pytest

from tests.explorer.explored import CHROMIUM

# Tests that start processes fork them from a server, which has imported these once. A fork of the test's own process
# would inherit threads of autograd, with which torch refuses to compute gradients.
multiprocessing.set_forkserver_preload(["lightning", "timm"])

CONFIGS = Path(__file__).parents[1] / "configs"
SMALL = [
    "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false", "--data.train_size=256", "--data.val_size=64",
    "--data.test_size=64",
]  # fmt: skip
"""Flags with which the quickstart takes seconds."""


SLOWEST = ("faults", "notebooks", "test_readme.py", "test_package.py")
"""Files and folders of tests/ that take longest. They run first, so that no process waits for another at the end."""


def pytest_collection_modifyitems(items):
    tests = Path(__file__).parent
    items.sort(key=lambda item: item.path.relative_to(tests).parts[0] not in SLOWEST)


@pytest.fixture
def gpu():
    """The first GPU; the test is skipped if there is none."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("this machine has no GPU, and on a CPU the test would repeat those that run everywhere")
    return torch.device("cuda")


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    """Train the quickstart for one short epoch; return the folder of its checkpoints, config and report."""
    from visionattn.cli import main

    home = tmp_path_factory.mktemp("quick")
    before = Path.cwd()
    os.chdir(home)
    try:
        assert main(["fit", "--config", str(CONFIGS / "quickstart.yaml"), *SMALL]) == 0
    finally:
        os.chdir(before)
    return home / "runs" / "quickstart" / "0"


@pytest.fixture(scope="session")
def photo_folder(tmp_path_factory):
    """Return a folder of five classes with twelve small pictures each. Every class has its own colour."""
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


@pytest.fixture(scope="session")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as driver:
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield chromium
        chromium.close()


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Replace the Hugging Face hub by a folder, in which each repository is a sub-folder `owner/name`."""
    home = tmp_path / "hub"

    def create_repo(repo_id, **options):
        (home / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(repo_id, folder_path, **options):
        shutil.copytree(folder_path, home / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, revision=None):
        path = home / repo_id / (revision or "") / filename
        if not path.exists():
            raise huggingface_hub.errors.EntryNotFoundError(f"404: no {filename} in {repo_id}\nmore")
        return str(path)

    api = mock.create_autospec(huggingface_hub.HfApi)
    api.return_value.create_repo.side_effect = create_repo
    api.return_value.upload_folder.side_effect = upload_folder
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", mock.create_autospec(huggingface_hub.hf_hub_download, side_effect=download)
    )
    return home
