"""Test the pyramid against torchvision's FeaturePyramidNetwork, and on every kind of backbone."""

import math
from functools import partial

import pytest
import torch
from torch import nn
from torchvision.ops import FeaturePyramidNetwork

from tests.models.detectors.small import VIT, pyramid
from tests.refusals import refuses
from visionattn.attention import CBAM, Windowed
from visionattn.errors import UsageError


def test_top_down_path_matches_torchvision():
    features = pyramid(strides=(4, 8, 16)).eval()
    features.smooth = nn.ModuleList(nn.Identity() for _ in range(3))
    torchvision_fpn = FeaturePyramidNetwork([8, 16, 24], 32).eval()
    for index, lateral in enumerate(features.lateral):
        torchvision_fpn.inner_blocks[index][0].load_state_dict(lateral.state_dict())
        torchvision_fpn.layer_blocks[index] = nn.Identity()
    images = torch.randn(2, 3, 72, 88)
    with torch.no_grad():
        maps = features.backbone.forward_intermediates(images, intermediates_only=True, indices=features.places)
        expected = torchvision_fpn({str(index): x for index, x in enumerate(maps)})
        torch.testing.assert_close(features(images), list(expected.values()))


@pytest.mark.parametrize(
    ("backbone", "strides", "options"),
    [
        ("resnet10t", (8, 16, 32, 64, 128), None),
        ("test_convnext", (4, 8, 16), None),
        ("test_efficientnet", (8, 16), None),
        ("vit_tiny_patch16_224", (4, 8, 16, 32, 64), None),
        ("vit_tiny_patch16_224", (8, 16), {**VIT, "dynamic_img_size": True}),
    ],
)
def test_maps_have_the_given_strides_and_every_weight_gets_a_gradient(backbone, strides, options):
    features = pyramid(backbone, strides=strides, **({"options": options} if options else {}))
    height, width = (64, 64) if features.plain and not options else (64, 96)
    maps = features(torch.randn(2, 3, height, width))
    assert [tuple(x.shape) for x in maps] == [
        (2, 32, math.ceil(height / stride), math.ceil(width / stride)) for stride in strides
    ]
    torch.stack([x.square().sum() for x in maps]).sum().backward()
    assert not [name for name, parameter in features.named_parameters() if parameter.grad is None]


@pytest.mark.parametrize(("backbone", "at"), [("resnet10t", "stages"), ("vit_tiny_patch16_224", "blocks")])
def test_inserted_attention_has_no_effect_while_gamma_is_0(backbone, at):
    torch.manual_seed(0)
    reference = pyramid(backbone).eval()
    torch.manual_seed(0)
    attending = pyramid(backbone, attention=CBAM, attention_at=at).eval()
    attending.load_state_dict(reference.state_dict(), strict=False)
    images = torch.randn(1, 3, 64, 64)
    gammas = [parameter for name, parameter in attending.named_parameters() if name.endswith("gamma")]
    with torch.no_grad():
        torch.testing.assert_close(attending(images), reference(images))
        for gamma in gammas:
            gamma.fill_(1.0)
        assert not torch.allclose(attending(images)[0], reference(images)[0])
    assert len(gammas) >= 2


def test_coarser_maps_of_a_vit_are_max_pooled():
    features = pyramid("vit_tiny_patch16_224", strides=(16, 32, 64)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (x,) = features.backbone.forward_intermediates(images, intermediates_only=True, indices=features.places)
        for scale, found, factor in zip(features.scales, features(images), (1, 2, 4), strict=True):
            torch.testing.assert_close(found, scale[-2:](nn.functional.max_pool2d(x, factor)))


def test_windowed_attention_keeps_the_weights_and_limits_attention_to_windows():
    torch.manual_seed(0)
    reference = pyramid("vit_tiny_patch16_224").eval()
    one_window, four_windows = (
        pyramid("vit_tiny_patch16_224", self_attention=[partial(Windowed, window=window)]).eval() for window in (4, 2)
    )
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        for swapped in (one_window, four_windows):
            swapped.load_state_dict(reference.state_dict())
        torch.testing.assert_close(one_window(images), reference(images))  # this window covers all 4 × 4 tokens
        assert not torch.allclose(four_windows(images)[0], reference(images)[0])


@pytest.mark.parametrize("dynamic", [False, True])
def test_image_size_that_a_vit_rejects_raises(dynamic):
    features = pyramid("vit_tiny_patch16_224", options={**VIT, "dynamic_img_size": dynamic})
    refuses(
        UsageError, r"does not accept images of 72×96 pixels: .*img_size", lambda: features(torch.randn(1, 3, 72, 96))
    )


def test_impossible_strides_raise():
    refuses(UsageError, r"strides 2, 4, 8, 16, 32, and none of 1", pyramid, strides=(1, 2))
    refuses(UsageError, "must double", pyramid, strides=(8, 32))
    with pytest.raises(UsageError, match="stride 12 cannot be made from patches of 16 pixels"):
        pyramid("vit_tiny_patch16_224", strides=(12, 24))
    refuses(UsageError, "multiple of 8", pyramid, channels=30)
