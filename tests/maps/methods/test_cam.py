"""Class activation maps match their equations in slow loops, pytorch-grad-cam and captum."""

import copy

import pytest
import timm
import torch
from torch import nn

from tests.capture import models
from tests.maps.methods.cams import SETTINGS, Convnet, assert_close_to_scale, values_and_gradient
from visionattn.errors import UsageError
from visionattn.maps import EigenCAM, FinerCAM, GradCAM, GradCAMPlusPlus, HiResCAM, LayerCAM, XGradCAM

peer = pytest.importorskip("pytorch_grad_cam")
captum = pytest.importorskip("captum.attr")
close = torch.testing.assert_close


def slow_gradcam(values, gradient):
    total = torch.zeros(values.shape[1:], dtype=torch.float64)
    for c in range(len(values)):
        alpha = sum(float(g) for g in gradient[c].flatten()) / gradient[c].numel()
        total += alpha * values[c]
    return total.clamp(min=0)


def slow_gradcam_plus_plus(values, gradient):
    total = torch.zeros(values.shape[1:], dtype=torch.float64)
    for c in range(len(values)):
        weight, area = 0.0, float(values[c].sum())
        for g in map(float, gradient[c].flatten()):
            if g != 0:
                weight += g**2 / (2 * g**2 + g**3 * area) * max(g, 0.0)
        total += weight * values[c]
    return total.clamp(min=0)


def slow_layercam(values, gradient):
    total = torch.zeros(values.shape[1:], dtype=torch.float64)
    for c in range(len(values)):
        for i in range(values.shape[1]):
            for j in range(values.shape[2]):
                total[i, j] += max(float(gradient[c, i, j]), 0.0) * float(values[c, i, j])
    return total.clamp(min=0)


def slow_hirescam(values, gradient):
    total = torch.zeros(values.shape[1:], dtype=torch.float64)
    for c in range(len(values)):
        for i in range(values.shape[1]):
            for j in range(values.shape[2]):
                total[i, j] += float(gradient[c, i, j]) * float(values[c, i, j])
    return total.clamp(min=0)


def slow_xgradcam(values, gradient):
    total = torch.zeros(values.shape[1:], dtype=torch.float64)
    for c in range(len(values)):
        area = sum(float(a) for a in values[c].flatten())
        pairs = zip(values[c].flatten().tolist(), gradient[c].flatten().tolist(), strict=True)
        if area != 0:
            total += sum(a / area * g for a, g in pairs) * values[c]
    return total.clamp(min=0)


BY_HAND = {
    GradCAM: slow_gradcam,
    GradCAMPlusPlus: slow_gradcam_plus_plus,
    LayerCAM: slow_layercam,
    HiResCAM: slow_hirescam,
    XGradCAM: slow_xgradcam,
}
NOT_NEGATIVE = ["convnet, after an in-place activation", "resnet", "resnet, early"]
"""Settings with activations ≥ 0. In the other settings the denominator of Grad-CAM++, 2 + g Σ A, can be close to zero,
which amplifies rounding errors."""
PEERS = {
    GradCAM: peer.GradCAM,
    GradCAMPlusPlus: peer.GradCAMPlusPlus,
    LayerCAM: peer.LayerCAM,
    HiResCAM: peer.HiResCAM,
    XGradCAM: peer.XGradCAM,
}


@pytest.mark.parametrize(
    ("method", "setting"),
    [(m, s) for m in BY_HAND for s in SETTINGS if (m, s) != (XGradCAM, "vit, early")],  # Σ A is close to zero there
    ids=lambda value: value if isinstance(value, str) else value.name,
)
@pytest.mark.parametrize("target", [None, 2])
def test_each_map_matches_its_equation(method, setting, target):
    make, size, layer, _ = SETTINGS[setting]
    values, gradient = values_and_gradient(setting, lambda out: out.amax(1) if target is None else out[:, target])
    maps = method(layer)(make(), models.pictures(size), target=target)
    expected = [BY_HAND[method](v, g) for v, g in zip(values, gradient, strict=True)]
    ill_conditioned = method in (GradCAMPlusPlus, XGradCAM) and setting not in NOT_NEGATIVE
    assert_close_to_scale(maps.raw, torch.stack(expected), 5e-3 if ill_conditioned else 1e-4)
    assert maps.source == layer


@pytest.mark.parametrize("method", [GradCAMPlusPlus, XGradCAM], ids=lambda m: m.name)
def test_quotients_match_their_equation_for_activations_of_any_sign(method):
    values, gradient = torch.randn(2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient[:, 0, 2] = 0
    found = method().combine(values.flatten(2), gradient.flatten(2)).unflatten(1, (4, 4))
    close(found, torch.stack([BY_HAND[method](v, g) for v, g in zip(values, gradient, strict=True)]))


@pytest.mark.parametrize(
    ("method", "setting"),
    [(m, s) for m in PEERS for s in (NOT_NEGATIVE if m is GradCAMPlusPlus else SETTINGS)],
    ids=lambda value: value if isinstance(value, str) else value.name,
)
def test_each_agrees_with_pytorch_grad_cam(method, setting):
    make, size, layer, reshape = SETTINGS[setting]
    images = models.pictures(size)
    maps = method(layer)(make(), images)
    model = make()
    if isinstance(model, Convnet):
        model.act.inplace = False  # an in-place ReLU changes the activations of pytorch-grad-cam
    cam = PEERS[method](model, [model.get_submodule(layer)], reshape_transform=reshape)
    cam.get_target_width_height = lambda images: tuple(maps.raw.shape[:0:-1])  # keep the resolution of the layer
    expected = torch.from_numpy(cam(images, None))
    close(maps.heatmaps, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("setting", ["convnet", "resnet", "resnet, early"])
def test_gradcam_agrees_with_captum(setting):
    make, size, layer, _ = SETTINGS[setting]
    model, images = make(), models.pictures(size)
    target = torch.tensor([1, 3])
    expected = (
        captum.LayerGradCam(model, model.get_submodule(layer))
        .attribute(images, target=target, relu_attributions=True)[:, 0]
        .detach()
    )
    assert_close_to_scale(GradCAM(layer)(model, images, target=target).raw, expected)


# The default layer --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "layer", "grid"),
    [
        (models.resnet, "layer4", (2, 2)),
        (models.vit, "blocks.2.norm1", (4, 4)),
        (lambda: models.vit(class_token=False, global_pool="avg"), "norm", (4, 4)),
        (models.torchvision_vit, "encoder.layers.encoder_layer_1.ln_1", (4, 4)),
        (lambda: models.swin(img_size=64), "norm", (8, 8)),
    ],
    ids=["resnet", "vit", "vit without class token", "torchvision vit", "swin"],
)
def test_the_default_layer_is_the_last_whose_every_position_affects_the_score(make, layer, grid):
    model, images = make(), models.pictures()
    maps = GradCAM()(model, images)
    assert maps.heatmaps.shape[1:] == grid
    named = GradCAM(layer)(model, images)
    close(maps.raw, named.raw)
    assert layer.partition(".")[0] in maps.source


@pytest.mark.parametrize("method", [*(method() for method in BY_HAND), FinerCAM(), EigenCAM()], ids=lambda m: m.name)
@pytest.mark.parametrize("make", [models.resnet, models.vit, models.swin], ids=["resnet", "vit", "swin"])
def test_all_methods_work_with_the_default_layer(method, make):
    model = make()
    images = models.pictures(32 if "Swin" in type(model).__name__ else 64)
    maps = method(model, images)
    assert maps.heatmaps.shape[0] == 2
    assert float(maps.heatmaps.amin()) == 0
    assert maps.heatmaps.amax((1, 2)).tolist() == [1, 1]


def test_class_and_register_tokens_are_not_on_the_map():
    model, images = models.vit(reg_tokens=4), models.pictures()
    outputs = []
    model.blocks[1].register_forward_hook(lambda module, args, out: outputs.append(out))
    gradient = torch.autograd.grad(model(images).amax(1).sum(), outputs[0])[0]
    values = outputs[0].detach()
    expected = [
        slow_gradcam(v[5:].T.unflatten(1, (4, 4)).double(), g[5:].T.unflatten(1, (4, 4)).double())
        for v, g in zip(values, gradient, strict=True)
    ]
    model.blocks[1]._forward_hooks.clear()
    assert_close_to_scale(GradCAM("blocks.1")(model, images).raw, torch.stack(expected))


def test_a_layer_without_a_grid_is_an_error_that_names_layers_on_a_grid():
    with pytest.raises(
        UsageError, match=r"the output of 'fc' does not lie on a grid; choose another layer, e\.g\. .*layer4"
    ):
        GradCAM("fc")(models.resnet(), models.pictures())


def test_the_error_for_a_mistyped_layer_names_the_nearest():
    with pytest.raises(UsageError, match=r"the model has no layer 'layer5'\. Nearest: layer"):
        GradCAM("layer5")(models.resnet(), models.pictures())


def test_a_layer_that_does_not_reach_the_score_is_an_error():
    class UnusedBranch(nn.Module):
        def __init__(self):
            super().__init__()
            self.aside, self.conv = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)

        def forward(self, images):
            self.aside(images)
            return self.conv(images).mean((2, 3))

    with pytest.raises(UsageError, match="no gradient reaches aside: the score does not depend on it"):
        GradCAM("aside")(UnusedBranch(), models.pictures(8))


def test_the_error_of_a_model_that_stops_gradients_names_methods_without_gradients():
    class HeadWithoutGradients(Convnet):
        def forward(self, images):
            x = self.second(images.repeat(1, 2, 1, 1))
            with torch.no_grad():
                return self.head(self.pool(x).flatten(1))

    with pytest.raises(UsageError, match=r"no gradient reaches second: .* or use eigencam or scorecam"):
        GradCAM("second")(models.randomised(HeadWithoutGradients()), models.pictures(8))
    EigenCAM("second")(models.randomised(HeadWithoutGradients()), models.pictures(8))


def test_layers_that_return_tuples_are_explained():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, images):
            return self.conv(images), "aside"

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.pair, self.head = Pair(), nn.Linear(4, 3)

        def forward(self, images):
            return self.head(self.pair(images)[0].relu().mean((2, 3)))

    model, images = models.randomised(Net()), models.pictures(8)
    close(GradCAM("pair")(model, images).raw, GradCAM("pair.conv")(model, images).raw)


def test_timm_models_without_a_head_need_a_target_function():
    model, images = timm.create_model("resnet10t", features_only=True).eval(), models.pictures()
    with pytest.raises(UsageError, match=r"has no \(B, K\) scores to choose a class from"):
        GradCAM()(model, images)
    maps = GradCAM("layer3")(copy.deepcopy(model), images, target=lambda out: out[-1].square().mean((1, 2, 3)))
    assert maps.target is None


@pytest.mark.parametrize("layer", [None, "layer2", "layer4"])
@pytest.mark.parametrize("surveyed_before", [False, True])
def test_gradient_checkpointing_does_not_change_the_heatmap(layer, surveyed_before):
    model, images = timm.create_model("test_resnet").eval(), models.pictures(64)
    expected = GradCAM(layer)(copy.deepcopy(model), images)
    if surveyed_before:
        GradCAM(layer)(model, images)
    model.set_grad_checkpointing(True)
    found = GradCAM(layer)(model, images)
    assert found.source == expected.source
    torch.testing.assert_close(found.raw, expected.raw)
    assert model.grad_checkpointing
