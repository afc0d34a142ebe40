"""Helpers for tests of the command line."""

import numpy as np
import torch
import torchvision
from PIL import Image

from tests.conftest import CONFIGS
from visionattn.cli import main

QUICKSTART = str(CONFIGS / "quickstart.yaml")


def fails(arguments, code, *parts, capsys):
    """Check that the command line exits with this code, and that its error message contains all parts."""
    assert main(arguments) == code
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ")
    for part in parts:
        assert part in message
    return message


class FakeMNIST(torchvision.datasets.VisionDataset):
    """Noise images with the interface of torchvision's MNIST, which a test must not download."""

    classes = [str(number) for number in range(10)]  # noqa: RUF012

    def __init__(self, root: str, train: bool = True, download: bool = False) -> None:
        self.data = np.random.default_rng(0).integers(0, 256, (6000, 28, 28), dtype=np.uint8)
        self.targets = torch.arange(6000) % 10

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return Image.fromarray(self.data[index]), int(self.targets[index])
