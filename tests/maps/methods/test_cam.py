"""Class activation maps match their equations in slow loops, pytorch-grad-cam and captum."""

import copy

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import models
from visionattn.errors import UsageError
from visionattn.maps import EigenCAM, GradCAM, GradCAMPlusPlus, LayerCAM, ScoreCAM

peer = pytest.importorskip("pytorch_grad_cam")
captum = pytest.importorskip("captum.attr")
close = torch.testing.assert_close


class Convnet(nn.Module):
    """Two convolutions at the resolution of the image, then a nonlinear head for four classes."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 5, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.pool, self.head = nn.AdaptiveAvgPool2d(3), nn.Linear(45, 4)

    def forward(self, images):
        x = self.second(self.act(self.first(images)))
        return self.head(self.pool(F.silu(x)).flatten(1))


def convnet():
    model = models.stirred(Convnet())
    with torch.no_grad():
        # pytorch-grad-cam adds small constants to denominators; large gradients make these constants negligible
        model.head.weight.mul_(1000)
    return model


def resnet():
    model = models.resnet()
    with torch.no_grad():
        model.fc.weight.mul_(1000)
    return model


def channels_first(tokens):
    """Drop the class token, which comes first, and arrange the patch tokens as a (B, C, 4, 4) map."""
    return tokens[:, 1:].unflatten(1, (4, 4)).permute(0, 3, 1, 2)


SETTINGS = {  # model, image size, layer, function from tokens to a map
    "convnet": (convnet, (20, 28), "second", None),
    "convnet, before an in-place activation": (convnet, (20, 28), "first", None),
    "convnet, after an in-place activation": (convnet, (20, 28), "act", None),
    "resnet": (resnet, (96, 64), "layer4", None),
    "resnet, early": (resnet, (96, 64), "layer2.0", None),
    "vit": (models.vit, (64, 64), "blocks.2.norm1", channels_first),
    "vit, early": (models.vit, (64, 64), "blocks.0", channels_first),
}


def values_and_gradient(setting, score):
    """Return the layer's output and its gradient, (B, C, h, w), by plain autograd in float64."""
    make, size, layer, reshape = SETTINGS[setting]
    model, outputs = make().double(), []

    def replace_by_clone(module, args, out):
        outputs.append(out)
        return out.clone()

    model.get_submodule(layer).register_forward_hook(replace_by_clone)
    output = model(models.pictures(size).double())
    gradient = torch.autograd.grad(score(output).sum(), outputs[0])[0]
    return [x.detach() if reshape is None else reshape(x.detach()) for x in (outputs[0], gradient)]


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


def slow_eigencam(values, gradient):
    matrix = values.flatten(1).T.numpy()  # positions × channels
    _, _, right = np.linalg.svd(matrix, full_matrices=False)
    found = torch.from_numpy(matrix @ right[0]).reshape(values.shape[1:])
    return -found if found.sum() < 0 else found


BY_HAND = {
    GradCAM: slow_gradcam,
    GradCAMPlusPlus: slow_gradcam_plus_plus,
    LayerCAM: slow_layercam,
    EigenCAM: slow_eigencam,
}
NOT_NEGATIVE = ["convnet, after an in-place activation", "resnet", "resnet, early"]
"""Settings with activations ≥ 0. In the other settings the denominator of Grad-CAM++, 2 + g Σ A, can be close to zero,
which amplifies rounding errors."""
PEERS = {GradCAM: peer.GradCAM, GradCAMPlusPlus: peer.GradCAMPlusPlus, LayerCAM: peer.LayerCAM}


def assert_close_to_scale(found, expected, tolerance=1e-4):
    scale = float(expected.abs().max())
    assert scale > 0
    close(found.double() / scale, expected.double() / scale, atol=tolerance, rtol=0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("method", BY_HAND, ids=lambda m: m.name)
@pytest.mark.parametrize("target", [None, 2])
def test_each_map_matches_its_equation(method, setting, target):
    make, size, layer, _ = SETTINGS[setting]
    values, gradient = values_and_gradient(setting, lambda out: out.amax(1) if target is None else out[:, target])
    maps = method(layer)(make(), models.pictures(size), target=target)
    expected = [BY_HAND[method](v, g) for v, g in zip(values, gradient, strict=True)]
    ill_conditioned = method is GradCAMPlusPlus and setting not in NOT_NEGATIVE
    assert_close_to_scale(maps.raw, torch.stack(expected), 5e-3 if ill_conditioned else 1e-4)
    assert maps.source == layer


def test_gradcam_plus_plus_matches_its_equation_for_activations_of_any_sign():
    values, gradient = torch.randn(2, 3, 5, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gradient[:, 0, 2] = 0
    found = GradCAMPlusPlus().combine(values.flatten(2), gradient.flatten(2)).unflatten(1, (4, 4))
    close(found, torch.stack([slow_gradcam_plus_plus(v, g) for v, g in zip(values, gradient, strict=True)]))


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


def slow_scorecam(model, image, values, target):
    scores = []
    for channel in values:
        mask = F.interpolate(channel[None, None], image.shape[1:], mode="bilinear")[0, 0]
        mask = (mask - mask.min()) / (mask.max() - mask.min()) if mask.max() > mask.min() else 0 * mask
        with torch.no_grad():
            scores.append(float(model((image * mask)[None])[0, target]))
    weights = np.exp(np.array(scores) - max(scores))
    weights /= weights.sum()
    return sum(float(w) * v for w, v in zip(weights, values, strict=True)).clamp(min=0)


@pytest.mark.parametrize("setting", ["convnet", "convnet, before an in-place activation", "vit", "vit, early"])
def test_scorecam_matches_its_algorithm(setting):
    make, size, layer, _ = SETTINGS[setting]
    model, images = make(), models.pictures(size)
    if isinstance(model, Convnet):
        model = models.stirred(Convnet())  # not convnet(): with its large scores, one channel would get all the weight
    values = values_and_gradient(setting, lambda out: out.amax(1))[0].float()
    target = model(images).argmax(1)
    expected = [slow_scorecam(model, x, v, t) for x, v, t in zip(images, values, target, strict=True)]
    assert_close_to_scale(ScoreCAM(layer, batch_size=4)(model, images).raw, torch.stack(expected))


def test_scorecam_agrees_with_pytorch_grad_cam_for_maps_of_the_images_size():
    model, images = models.stirred(Convnet()), models.pictures((20, 28))
    maps = ScoreCAM("second")(model, images)
    cam = peer.ScoreCAM(model, [model.second])
    close(maps.heatmaps, torch.from_numpy(cam(images, None)), atol=1e-4, rtol=0)


def test_scorecam_of_constant_channels_is_finite():
    model, images = models.stirred(Convnet()), models.pictures((20, 28))
    with torch.no_grad():
        model.second.weight[1] = 0
    assert ScoreCAM("second")(model, images).raw.isfinite().all()


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


@pytest.mark.parametrize("method", [GradCAM(), GradCAMPlusPlus(), LayerCAM(), EigenCAM()], ids=lambda m: m.name)
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
        GradCAM("second")(models.stirred(HeadWithoutGradients()), models.pictures(8))
    EigenCAM("second")(models.stirred(HeadWithoutGradients()), models.pictures(8))


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

    model, images = models.stirred(Net()), models.pictures(8)
    close(GradCAM("pair")(model, images).raw, GradCAM("pair.conv")(model, images).raw)


def test_eigencam_of_a_layer_with_more_channels_than_positions_matches_its_equation():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 200, 4, 4)

        def forward(self, images):
            return self.conv(images).mean((2, 3))

    model, images = models.stirred(Wide()), models.pictures((8, 12))
    with torch.no_grad():
        expected = [slow_eigencam(v, None) for v in model.conv(images).double()]
    assert_close_to_scale(EigenCAM()(model, images).raw, torch.stack(expected))


def test_timm_models_without_a_head_need_a_target_function():
    model, images = timm.create_model("resnet10t", features_only=True).eval(), models.pictures()
    with pytest.raises(UsageError, match=r"has no \(B, K\) scores to choose a class from"):
        GradCAM()(model, images)
    maps = GradCAM("layer3")(copy.deepcopy(model), images, target=lambda out: out[-1].square().mean((1, 2, 3)))
    assert maps.target is None


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_scorecam_with_a_target_function_of_the_whole_batch_equals_one_target_per_image(batch_size):
    model, images = models.stirred(Convnet()), models.pictures(32, 3)
    targets = torch.tensor([1, 3, 2])
    method = ScoreCAM("second", batch_size=batch_size)
    expected = method(model, images, target=targets)
    found = method(model, images, target=lambda output: output[torch.arange(3), targets])
    torch.testing.assert_close(found.raw, expected.raw)


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
