"""Errors of methods for wrong arguments, and warnings for maps that show nothing."""

import warnings

import pytest
import torch

from tests.capture import models
from tests.maps.quick import quick
from tests.refusals import refuses
from visionattn.capture import survey_images
from visionattn.errors import DataError, MapWarning, UsageError
from visionattn.maps import (
    METHODS,
    Chefer,
    DinoHeads,
    GradCAM,
    GradientAttention,
    RawAttention,
    Rollout,
    ScoreCAM,
    ValueNorm,
)


@pytest.mark.parametrize("make", [models.swin, models.resnet, lambda: models.vit(class_token=False, global_pool="avg")])
def test_dino_without_a_class_token_is_an_error(make):
    model = make()
    with pytest.raises(UsageError, match=r"dino needs .* Methods that fit: (?!.*dino)"):
        DinoHeads()(model, models.pictures(32 if "Swin" in type(model).__name__ else 64))


def test_value_norm_without_values_is_an_error_that_names_methods_that_fit():
    model = models.vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(UsageError, match=r"blocks\.2\.attn computes its own softmax.* fit: dino, raw, rollout"):
        ValueNorm()(model, models.pictures())


def test_a_model_that_is_not_a_module_is_an_error():
    with pytest.raises(UsageError, match=r"model must be a torch\.nn\.Module, got function"):
        RawAttention()(lambda images: images, models.pictures())


@pytest.mark.parametrize("method", [RawAttention, GradientAttention, ValueNorm, lambda layer: DinoHeads(layer=layer)])
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("blocks.1.atn", r"nothing attends in 'blocks\.1\.atn'\. Nearest: blocks\.1\.attn"),
        ("zzz", r"nothing attends in 'zzz'\. Layers that attend: blocks\.0\.attn, blocks\.1\.attn, blocks\.2\.attn"),
        (3, "there is no layer 3: the model has 3 layers of attention, 0 to 2"),
        (-4, "there is no layer -4"),
    ],
)
def test_the_error_for_a_wrong_layer_names_the_nearest(method, layer, message):
    refuses(UsageError, message, lambda: method(layer)(models.vit(), models.pictures()))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head": 3}, "blocks.2.attn has no head 3; its heads are 0 to 2"),
        ({"head": -1}, "has no head -1"),
        ({"query": (4, 0)}, r"blocks.2.attn has no patch \(4, 0\): its grid is 4×4"),
        ({"query": (0, -1)}, r"has no patch \(0, -1\)"),
    ],
)
def test_wrong_heads_and_patches_are_errors(options, message):
    refuses(UsageError, message, lambda: RawAttention(**options)(models.vit(), models.pictures()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RawAttention(fuse="sum"), "fuse must be mean, max or min, got 'sum'"),
        (lambda: Rollout(fuse="sum"), "fuse must be"),
        (lambda: Rollout(discard=1.0), r"discard must be in \[0, 1\), got 1.0"),
        (lambda: Rollout(discard=-0.1), "discard must be"),
        (lambda: DinoHeads(mass=0), r"mass must be in \(0, 1\], got 0"),
        (lambda: ScoreCAM(batch_size=0), "batch_size must be at least 1, got 0"),
    ],
)
def test_wrong_options_are_errors_when_the_method_is_made(make, message):
    refuses(UsageError, message, make)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 64, 64), UsageError, r"images must be \(B, C, H, W\), got \(3, 64, 64\); .* image\[None\]"),
        (torch.zeros(0, 3, 64, 64), DataError, "the batch of images is empty"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), UsageError, "floating point, got torch.uint8"),
        (torch.full((1, 3, 64, 64), float("nan")), DataError, "the images hold NaN or infinity"),
        (torch.full((1, 3, 64, 64), float("inf")), DataError, "the images hold NaN or infinity"),
    ],
    ids=["no batch axis", "empty batch", "integers", "NaN", "infinite"],
)
@pytest.mark.parametrize("name", METHODS)
def test_images_that_cannot_be_explained_are_errors(name, images, error, message):
    refuses(error, message, lambda: METHODS[name]()(models.vit(depth=1), images))


FITTING = [name for name, kind in METHODS.items() if kind.fits(survey_images(models.vit(), models.pictures()))]


@pytest.mark.parametrize("name", FITTING)
def test_the_error_names_weights_that_hold_nan(name):
    model = models.vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"blocks\.0\.attn\.qkv\.weight holds NaN or infinity"):
        quick(name)(model, models.pictures())


@pytest.mark.parametrize("name", ["beyond_intuition", "chefer", "gradcam", "legrad", "tokentm"])
def test_the_error_names_a_head_that_holds_nan(name):
    model = models.vit()
    with torch.no_grad():
        model.head.weight.fill_(float("nan"))
    with pytest.raises(DataError, match=r"head\.weight holds NaN or infinity"):
        METHODS[name]()(model, models.pictures())


def test_the_error_distinguishes_an_overflow_from_nan_weights():
    model = models.vit()
    with torch.no_grad():
        model.blocks[2].norm1.bias.fill_(1e38)
    with pytest.raises(DataError, match="the weights are finite, so an activation overflows: try float32"):
        RawAttention()(model, models.pictures())


def test_a_zero_map_gives_a_warning():
    model = models.resnet()
    with torch.no_grad():
        model.fc.weight.zero_()
    with pytest.warns(MapWarning, match="2 of 2 gradcam heatmaps of layer4.* are zero and show nothing"):
        maps = GradCAM()(model, models.pictures())
    assert not maps.heatmaps.any()


def test_a_constant_map_gives_a_warning():
    model = models.vit()
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight.zero_()
        model.blocks[2].attn.qkv.bias.zero_()
    with pytest.warns(MapWarning, match="2 of 2 raw heatmaps of attention of blocks.2.attn are constant"):
        maps = RawAttention()(model, models.pictures())
    assert not maps.heatmaps.any()
    torch.testing.assert_close(maps.raw, torch.full((2, 4, 4), 1 / 17))


def test_the_warning_counts_the_constant_maps_of_a_batch():
    model, images = models.vit(class_token=False, global_pool="avg", pos_embed="none"), models.pictures(batch=3)
    images[1] = 0
    with pytest.warns(MapWarning, match="1 of 3 raw heatmaps"):
        maps = RawAttention()(model, images)
    assert maps.heatmaps.amax((1, 2)).tolist() == [1, 0, 1]


def test_gradcam_after_the_last_attention_of_a_vit_gives_a_zero_map_and_a_warning():
    with pytest.warns(MapWarning, match="are zero and show nothing; try another layer"):
        GradCAM("norm")(models.vit(), models.pictures())


@pytest.mark.parametrize("method", [Rollout(), Chefer()], ids=lambda m: m.name)
def test_methods_that_combine_all_layers_warn_for_window_attention_and_not_for_a_vit(method):
    with pytest.warns(MapWarning, match=f"{method.name} assumes that every layer attends to all tokens"):
        method(models.swin(), models.pictures(32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(models.vit(), models.pictures())
