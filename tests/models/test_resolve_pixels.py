"""For models named after timm or torchvision, our preprocessing gives the same pixels as these libraries.

test_transformers_processor.py does the same for transformers.
"""

import pytest
import timm
import torchvision
from PIL import Image
from torch import nn

from tests.models.compared import ALL, QUICK, worst
from visionattn.models.backbone import preprocess_of
from visionattn.models.resolve import load_model
from visionattn.models.sources.torchvision_classifier import torchvision_preprocess


def timm_configurations():
    """Return (crop mode, interpolation, crop_pct, input size) of every pretrained configuration of timm, once each."""
    found = [timm.get_pretrained_cfg(name) for name in timm.list_models(pretrained=True)]
    return sorted({(c.crop_mode, c.interpolation, c.crop_pct, c.input_size) for c in found}, key=str)


def timm_difference(configuration, sizes):
    mode, interpolation, fraction, input_size = configuration
    model = nn.Identity()
    model.pretrained_cfg = {
        "input_size": input_size, "crop_pct": fraction, "crop_mode": mode, "interpolation": interpolation,
        "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25),
    }  # fmt: skip
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    return worst(preprocess_of(model), lambda x: transform(Image.fromarray(x)), sizes)


def test_timms_configurations_of_each_kind():
    """One configuration for each crop mode, interpolation and crop_pct, the one with the smallest input."""
    kinds = {}
    for configuration in sorted(timm_configurations(), key=lambda c: c[3][1] * c[3][2], reverse=True):
        kinds[configuration[:3]] = configuration
    assert {mode for mode, _, _ in kinds} >= {"center", "squash"}  # and "border", since timm 1.0.27
    assert {way for _, way, _ in kinds} == {"bilinear", "bicubic"}
    assert max(timm_difference(configuration, QUICK[:1]) for configuration in kinds.values()) <= 1


@pytest.mark.slow
def test_all_configurations_of_timm():
    configurations = timm_configurations()
    assert len(configurations) > 100
    for configuration in configurations:
        assert timm_difference(configuration, ALL) <= 1, configuration


def torchvision_weights():
    """Return (name, transforms) of one classifier of torchvision for each distinct preprocessing."""
    found = {}
    for name in torchvision.models.list_models(module=torchvision.models):
        for member in torchvision.models.get_model_weights(name):
            transforms = member.transforms()
            found.setdefault(repr(transforms), (f"torchvision:{name}/{member.name}", transforms))
    return list(found.values())


@pytest.mark.parametrize("sizes", [QUICK[:1], pytest.param(ALL, marks=pytest.mark.slow)])
def test_the_transforms_of_all_weights_of_torchvision(sizes):
    weights = torchvision_weights()
    assert len(weights) > 25
    for name, transforms in weights:
        assert worst(torchvision_preprocess(name), lambda x: transforms(Image.fromarray(x)), sizes) <= 1, name  # noqa: B023


def test_load_model_takes_the_preprocessing_of_the_name():
    named = load_model("torchvision:resnet18/IMAGENET1K_V1", pretrained=False).preprocess
    assert named == torchvision_preprocess("torchvision:resnet18/IMAGENET1K_V1")
    newer = load_model("torchvision:resnet50", pretrained=False).preprocess
    assert newer.crop_fraction == pytest.approx(224 / 232)
