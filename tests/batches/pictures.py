"""Small image files, a checkpoint and a model for the tests of `visionattn.batches`."""

import numpy as np
import timm
import torch
from PIL import Image

from visionattn.models import NamedModel


def make_model():
    """Return a small ViT with fixed weights; other processes import this function."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=3)
    return NamedModel(model.eval(), None, ["cat", "dog", "bird"])


def make_and_note(path):
    """Return the model of `make_model`, and append a line to a file."""
    with open(path, "a") as file:
        file.write("made\n")
    return make_model()


def write_pictures(folder, count=3):
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(0)
    paths = [folder / f"{number}.png" for number in range(count)]
    for number, path in enumerate(paths):
        Image.fromarray(random.integers(0, 256, (60, 70 + 10 * number, 3), dtype=np.uint8)).save(path)
    return paths
