"""A network of the user's own module, from training to overlays, as the README of models/ says."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.commands.command_line import fails
from tests.conftest import SMALL
from visionattn.cli import main

NETWORK = '''
from torch import nn

class OwnNet(nn.Module):
    """A convolution and a linear head for ten classes."""

    num_classes = 10

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, stride=2, padding=1)
        self.head = nn.Linear(width, 10)

    def forward(self, x):
        return self.head(self.conv(x).relu().mean((2, 3)))
'''
CONFIG = """
model:
  class_path: visionattn.tasks.Classification
  init_args: {network: {class_path: ownnet_of_a_test.OwnNet, init_args: {width: 6}}}
data: {class_path: visionattn.data.ClutteredDigitsData, init_args: {train_size: 8000}}
name: own
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the module, a config, and the run that the console script trained from it."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "ownnet_of_a_test.py").write_text(NETWORK)
    (folder / "own.yaml").write_text(CONFIG)
    script = Path(sys.executable).with_name(
        "visionattn"
    )  # unlike python -m, a script does not search the current folder
    command = [script, "fit", "--config", "own.yaml", *SMALL]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture
def in_folder(folder, monkeypatch):
    monkeypatch.chdir(folder)
    yield folder
    sys.modules.pop("ownnet_of_a_test", None)


def test_a_checkpoint_of_an_own_network_needs_trust(in_folder, photo_folder, tmp_path, capsys):
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", str(tmp_path / "out")]
    command += ["--ckpt", "runs/own/0/best.ckpt"]
    fails(command, 1, "names ownnet_of_a_test.OwnNet", "--trust ownnet_of_a_test", capsys=capsys)
    assert "ownnet_of_a_test" not in sys.modules  # nothing of it ran
    fails([*command, "--trust", "no_such_module"], 2, "no Python module 'no_such_module'", capsys=capsys)
    assert main([*command, "--trust", "ownnet_of_a_test"]) == 0
    assert list((tmp_path / "out").glob("*.overlay.jpg"))


def test_an_own_function_with_weights_gives_overlays(in_folder, photo_folder, tmp_path, capsys):
    content = torch.load("runs/own/0/best.ckpt", weights_only=True)
    torch.save({"state_dict": content["state_dict"]}, "plain.pth")
    Path("names.txt").write_text("".join(f"digit {number}\n" for number in range(10)))
    Path("make_of_a_test.py").write_text("from ownnet_of_a_test import OwnNet\ndef make(): return OwnNet(6)\n")
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", str(tmp_path / "out")]
    command += ["--model", "make_of_a_test:make", "--weights", "plain.pth", "--size", "48", "--classes", "names.txt"]
    assert main([*command, "--target", "digit 3"]) == 0
    assert list((tmp_path / "out").glob("*.overlay.jpg"))
    fails([*command, "--mean", "0.5", "0.5"], 2, "--size, --mean and --std: mean and std need three", capsys=capsys)
    fails(
        [*command, "--trust", "x", "--size", "7", "7", "7"], 2, "--size, --mean and --std: size must be", capsys=capsys
    )
    timm = ["--model", "vit_tiny_patch16_224", "--weights", "random", "--size", "48"]
    message = (
        "vit_tiny_patch16_224 does not accept images of 48 × 48 pixels (Input height (48) doesn't match model (224)"
    )
    fails([*command[:5], *timm], 2, message, capsys=capsys)
    fails(
        [*command[:5], "--ckpt", "runs/own/0/best.ckpt", "--trust", "ownnet_of_a_test", "--size", "48"],
        2,
        "--size needs --model",
        capsys=capsys,
    )
