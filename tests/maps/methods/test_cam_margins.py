"""Finer-CAM and XGrad-CAM match slow loops and torchcam; Finer-CAM refuses a target that is no class."""

import copy

import pytest
import torch

from tests.capture import models
from tests.maps.methods.cams import assert_close_to_scale, convnet, resnet
from visionattn.errors import UsageError
from visionattn.maps import FinerCAM, GradCAM, XGradCAM

torchcam = pytest.importorskip("torchcam.methods", reason="torchcam needs Python 3.11")


def slow_competitors(scores, target, count):
    """Return the classes whose scores are closest to the target's, nearest first."""
    others = [k for k in range(len(scores)) if k != target]
    return sorted(others, key=lambda k: abs(float(scores[k]) - float(scores[target])))[:count]


def slow_finercam(model, layer, image, target, gamma, count):
    """Sum the Grad-CAM weights of the class and, weighted by −γ / T, those of each of T competitors; then relu."""
    outputs = []
    handle = model.get_submodule(layer).register_forward_hook(lambda module, args, out: outputs.append(out))
    scores = model(image[None])[0]
    handle.remove()
    target = int(scores.argmax()) if target is None else target
    competitors = slow_competitors(scores.detach(), target, count)
    total = torch.zeros(outputs[0].shape[2:], dtype=torch.float64)
    for k, factor in [(target, 1.0), *((k, -gamma / len(competitors)) for k in competitors)]:
        (gradient,) = torch.autograd.grad(scores[k], outputs[0], retain_graph=True)
        for c in range(gradient.shape[1]):
            total += factor * float(gradient[0, c].mean()) * outputs[0][0, c].detach()
    return total.clamp(min=0)


@pytest.mark.parametrize("target", [None, 2])
@pytest.mark.parametrize(("gamma", "count"), [(0.6, 3), (1.0, 1), (0.3, 99)])
@pytest.mark.parametrize(("make", "layer"), [(convnet, "second"), (resnet, "layer4")], ids=["convnet", "resnet"])
def test_finercam_matches_its_equation(make, layer, gamma, count, target):
    images = models.pictures((96, 64))
    found = FinerCAM(layer, gamma=gamma, competitors=count)(make(), images, target=target)
    model = make().double()
    expected = [slow_finercam(model, layer, image, target, gamma, count) for image in images.double()]
    assert_close_to_scale(found.raw, torch.stack(expected))


@pytest.mark.parametrize("target", [1, 3])
def test_finercam_agrees_with_torchcam(target):
    images = models.pictures((96, 64))
    model = resnet()
    with torchcam.FinerCAM(model, "layer4", gamma=0.6, num_references=3) as cam:
        expected = torch.stack([cam(target, model(image[None]))[0][0] for image in images])
    found = FinerCAM("layer4")(resnet(), images, target=target)
    torch.testing.assert_close(found.heatmaps, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("layer", ["layer2.0", "layer4"])
def test_xgradcam_agrees_with_torchcam(layer):
    images = models.pictures((96, 64))
    model = resnet()
    with torchcam.XGradCAM(model, layer) as cam:
        expected = torch.stack([cam(2, model(image[None]))[0][0] for image in images])
    found = XGradCAM(layer)(resnet(), images, target=2)
    torch.testing.assert_close(found.heatmaps, expected, atol=1e-4, rtol=0)


def test_a_channel_of_zeros_has_no_weight_in_xgradcam():
    values, gradient = torch.rand(2, 1, 3, 4, generator=torch.Generator().manual_seed(0))
    values[:, 1] = 0
    expected = XGradCAM().combine(values[:, [0, 2]], gradient[:, [0, 2]])
    torch.testing.assert_close(XGradCAM().combine(values, gradient), expected)


def test_finercam_without_comparison_is_gradcam():
    images = models.pictures((20, 28))
    found, expected = FinerCAM("second", gamma=0)(convnet(), images), GradCAM("second")(convnet(), images)
    torch.testing.assert_close(found.raw, expected.raw)
    assert found.target.tolist() == expected.target.tolist()


def test_finercam_refuses_what_it_cannot_compare():
    model, images = convnet(), models.pictures((20, 28))
    with pytest.raises(UsageError, match="its target must be a class and not a function; use gradcam"):
        FinerCAM("second")(model, images, target=lambda output: output[:, 0])
    single = copy.deepcopy(model)
    single.head = torch.nn.Linear(45, 1)
    with pytest.raises(UsageError, match="this model has only one score; use gradcam"):
        FinerCAM("second")(single, images)
    with pytest.raises(UsageError, match="gamma must be a finite number of at least 0, got -1"):
        FinerCAM(gamma=-1)
    with pytest.raises(UsageError, match="competitors must be at least 1, got 0"):
        FinerCAM(competitors=0)
