"""What cannot work is told in a sentence that says what does; nothing is ever silently empty."""

import warnings

import pytest
import torch
from torch import nn

from tests.maps import models
from visionattn.errors import DataError, UsageError
from visionattn.maps import (
    METHODS,
    Chefer,
    DinoHeads,
    GradCAM,
    GradientAttention,
    MapWarning,
    RawAttention,
    Rollout,
    ScoreCAM,
    ValueNorm,
    capture,
)

ATTENTION = ["raw", "rollout", "chefer", "grad_rollout", "grad_attention", "value_norm", "dino"]


# Models ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ATTENTION)
def test_a_model_that_never_attends_names_the_methods_that_fit(name):
    message = f"{name} needs attention over positions; this ResNet has none. Methods that fit: gradcam, gradcam"
    with pytest.raises(UsageError) as caught:
        METHODS[name]()(models.resnet(), models.pictures())
    assert str(caught.value).startswith(message)
    assert "raw," not in str(caught.value).partition("fit:")[2]


def test_capture_of_a_model_that_never_attends_is_an_error_and_no_empty_list():
    model = models.resnet()
    with (
        pytest.raises(UsageError, match="nothing in this ResNet attends; methods that fit: gradcam"),
        torch.no_grad(),
        capture(model),
    ):
        model(models.pictures())


def test_the_methods_that_an_error_names_do_work():
    model, images = models.resnet("seresnet18"), models.pictures()
    with pytest.raises(UsageError) as caught:
        RawAttention()(model, images)
    for name in str(caught.value).partition("fit: ")[2].rstrip(".").split(", "):
        assert METHODS[name]()(model, images).raw.isfinite().all()


@pytest.mark.parametrize("make", [models.swin, models.resnet, lambda: models.vit(class_token=False, global_pool="avg")])
def test_dino_without_a_class_token_is_an_error(make):
    model = make()
    with pytest.raises(UsageError, match=r"dino needs .* Methods that fit: (?!.*dino)"):
        DinoHeads()(model, models.pictures(32 if "Swin" in type(model).__name__ else 64))


def test_values_that_are_hidden_are_an_error_that_names_what_fits():
    model = models.vit()
    for block in model.blocks:
        block.attn.fused_attn = False
    with pytest.raises(UsageError, match=r"blocks\.2\.attn, which attends by a softmax of its own .* fit: raw, dino"):
        ValueNorm()(model, models.pictures())


@pytest.mark.parametrize("how", [torch.jit.script, lambda model: torch.jit.trace(model, models.pictures())])
@pytest.mark.filterwarnings("ignore")
def test_scripted_and_traced_models_cannot_be_watched(how):
    scripted = how(models.vit(depth=1))
    message = "a scripted or traced model cannot be watched; pass the model it was made from"
    for watch in (lambda: capture(scripted), lambda: RawAttention()(scripted, models.pictures())):
        with pytest.raises(UsageError, match=message):
            watch()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_scripted_part_does_not_keep_the_rest_from_being_watched():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.head = models.vit(), torch.jit.script(nn.Sequential(nn.Linear(7, 7), nn.ReLU()))

        def forward(self, images):
            return self.head(self.vit(images))

    net = Net().eval()
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), capture(net) as records:
        net(models.pictures())
    assert len(records) == 3
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_what_is_no_module_is_an_error():
    with pytest.raises(UsageError, match=r"model must be a torch\.nn\.Module, got function"):
        RawAttention()(lambda images: images, models.pictures())


# Layers, heads, patches --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [RawAttention, GradientAttention, ValueNorm, lambda layer: DinoHeads(layer=layer)])
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("blocks.1.atn", r"nothing attends in 'blocks\.1\.atn'\. Nearest: blocks\.1\.attn"),
        ("zzz", r"nothing attends in 'zzz'\. Layers that attend: blocks\.0\.attn, blocks\.1\.attn, blocks\.2\.attn"),
        (3, "there is no layer 3: the model attends 3 times"),
        (-4, "there is no layer -4"),
    ],
)
def test_a_wrong_layer_names_the_nearest(method, layer, message):
    with pytest.raises(UsageError, match=message):
        method(layer)(models.vit(), models.pictures())


def test_a_wrong_layer_of_a_capture_names_the_nearest_and_leaves_all_as_it_was():
    model, images = models.vit(), models.pictures()
    before = models.state_of(model)
    with (
        torch.no_grad(),
        pytest.raises(UsageError, match=r"Nearest: blocks\.1\.attn"),
        capture(model, layers=["bloks.1.attn"]),
    ):
        model(images)
    models.assert_same_state(before, models.state_of(model))


def test_a_record_asked_for_by_a_wrong_name_lists_the_nearest():
    model = models.vit()
    with torch.no_grad(), capture(model) as records:
        model(models.pictures())
    with pytest.raises(UsageError, match=r"nothing attends in 'blocks\.2\.at'\. Nearest: blocks\.2\.attn"):
        records["blocks.2.at"]


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
    with pytest.raises(UsageError, match=message):
        RawAttention(**options)(models.vit(), models.pictures())


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
def test_wrong_options_are_errors_at_once(make, message):
    with pytest.raises(UsageError, match=message):
        make()


# Images ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["raw", "rollout", "chefer", "gradcam", "scorecam"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 48, 48), r"wants images of 3×64×64 and got 3×48×48 \(.*\); resize them, or .* img_size=\(48, 48\)"),
        ((2, 3, 70, 64), "wants images of 3×64×64 and got 3×70×64"),
        ((2, 1, 64, 64), "wants images of 3×64×64 and got 1×64×64"),
    ],
)
def test_images_that_the_model_cannot_take_are_an_error_that_says_which_it_wants(name, shape, message):
    with pytest.raises(UsageError, match=message):
        METHODS[name]()(models.vit(), torch.randn(shape))


def test_the_size_that_torchvision_wants_is_told_too():
    with pytest.raises(UsageError, match="wants images of 64×64 and got 48×48"):
        GradCAM()(models.torchvision_vit(), models.pictures(48))


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(3, 64, 64), UsageError, r"images must be \(B, C, H, W\), got \(3, 64, 64\); .* image\[None\]"),
        (torch.zeros(0, 3, 64, 64), DataError, "the batch of images is empty"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), UsageError, "floating point, got torch.uint8"),
        (torch.full((1, 3, 64, 64), float("nan")), DataError, "the images hold NaN or infinity"),
        (torch.full((1, 3, 64, 64), float("inf")), DataError, "the images hold NaN or infinity"),
    ],
    ids=["one image", "none", "integers", "NaN", "infinite"],
)
@pytest.mark.parametrize("name", METHODS)
def test_images_that_cannot_be_explained_are_errors(name, images, error, message):
    with pytest.raises(error, match=message):
        METHODS[name]()(models.vit(depth=1), images)


def test_capture_of_an_empty_batch_gives_empty_weights_or_a_clear_error():
    model = models.vit()
    with torch.no_grad(), capture(model) as records:
        assert model(torch.zeros(0, 3, 64, 64)).shape == (0, 7)
    assert [record.weights.shape for record in records] == [(0, 1, 3, 17)] * 3
    with torch.no_grad(), capture(model) as records:  # and nothing wrong is remembered
        model(models.pictures())
    assert [record.grid for record in records] == [(4, 4)] * 3


# Weights -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*ATTENTION, "gradcam", "gradcam++", "layercam", "eigencam", "scorecam"])
def test_nan_weights_are_named(name):
    model = models.vit()
    with torch.no_grad():
        model.blocks[0].attn.qkv.weight[0, 0] = float("nan")
    with pytest.raises(DataError, match=r"blocks\.0\.attn\.qkv\.weight holds NaN or infinity"):
        METHODS[name]()(model, models.pictures())


def test_an_overflow_of_finite_weights_is_told_from_nan_weights():
    model = models.vit()
    with torch.no_grad():
        model.blocks[2].norm1.bias.fill_(1e38)
    with pytest.raises(DataError, match="the weights are finite, so an activation overflows: try float32"):
        RawAttention()(model, models.pictures())


# Doubts ------------------------------------------------------------------------------------------------------------


def test_a_zero_map_is_warned_of():
    model = models.resnet()
    with torch.no_grad():
        model.fc.weight.zero_()
    with pytest.warns(MapWarning, match="2 of 2 gradcam heatmaps of layer4.* are zero and show nothing"):
        maps = GradCAM()(model, models.pictures())
    assert not maps.heatmaps.any()


def test_a_constant_map_is_warned_of():
    model = models.vit()
    with torch.no_grad():
        model.blocks[2].attn.qkv.weight.zero_()
        model.blocks[2].attn.qkv.bias.zero_()
    with pytest.warns(MapWarning, match="2 of 2 raw heatmaps of attention of blocks.2.attn are constant"):
        maps = RawAttention()(model, models.pictures())
    assert not maps.heatmaps.any()
    torch.testing.assert_close(maps.raw, torch.full((2, 4, 4), 1 / 17))


def test_one_constant_map_of_a_batch_is_counted():
    model, images = models.vit(class_token=False, global_pool="avg", pos_embed="none"), models.pictures(batch=3)
    images[1] = 0
    with pytest.warns(MapWarning, match="1 of 3 raw heatmaps"):
        maps = RawAttention()(model, images)
    assert maps.heatmaps.amax((1, 2)).tolist() == [1, 0, 1]


def test_a_layer_behind_the_last_attention_of_a_class_token_gives_a_zero_map_and_a_warning():
    with pytest.warns(MapWarning, match="are zero and show nothing; try another layer"):
        GradCAM("norm")(models.vit(), models.pictures())


@pytest.mark.parametrize("method", [Rollout(), Chefer()], ids=lambda m: m.name)
def test_a_chain_through_windows_is_warned_of_and_one_through_a_vit_is_not(method):
    with pytest.warns(MapWarning, match=f"{method.name} assumes that every layer sees all tokens"):
        method(models.swin(), models.pictures(32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(models.vit(), models.pictures())
