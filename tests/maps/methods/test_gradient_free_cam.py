"""Eigen-CAM and Score-CAM match their equations in slow loops, and Score-CAM matches pytorch-grad-cam."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import models
from tests.maps.methods.cams import SETTINGS, Convnet, assert_close_to_scale, values_and_gradient
from visionattn.maps import EigenCAM, ScoreCAM

peer = pytest.importorskip("pytorch_grad_cam")
close = torch.testing.assert_close


def slow_eigencam(values, gradient):
    matrix = values.flatten(1).T.numpy()  # positions × channels
    _, _, right = np.linalg.svd(matrix, full_matrices=False)
    found = torch.from_numpy(matrix @ right[0]).reshape(values.shape[1:])
    return -found if found.sum() < 0 else found


@pytest.mark.parametrize("setting", SETTINGS)
def test_eigencam_matches_its_equation(setting):
    make, size, layer, _ = SETTINGS[setting]
    values, _ = values_and_gradient(setting, lambda out: out.amax(1))
    maps = EigenCAM(layer)(make(), models.pictures(size))
    assert_close_to_scale(maps.raw, torch.stack([slow_eigencam(v, None) for v in values]))
    assert maps.source == layer


def test_eigencam_of_a_layer_with_more_channels_than_positions_matches_its_equation():
    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 200, 4, 4)

        def forward(self, images):
            return self.conv(images).mean((2, 3))

    model, images = models.randomised(Wide()), models.pictures((8, 12))
    with torch.no_grad():
        expected = [slow_eigencam(v, None) for v in model.conv(images).double()]
    assert_close_to_scale(EigenCAM()(model, images).raw, torch.stack(expected))


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
        model = models.randomised(
            Convnet()
        )  # not convnet(): with its large scores, one channel would get all the weight
    values = values_and_gradient(setting, lambda out: out.amax(1))[0].float()
    target = model(images).argmax(1)
    expected = [slow_scorecam(model, x, v, t) for x, v, t in zip(images, values, target, strict=True)]
    assert_close_to_scale(ScoreCAM(layer, batch_size=4)(model, images).raw, torch.stack(expected))


def test_scorecam_agrees_with_pytorch_grad_cam_for_maps_of_the_images_size():
    model, images = models.randomised(Convnet()), models.pictures((20, 28))
    maps = ScoreCAM("second")(model, images)
    cam = peer.ScoreCAM(model, [model.second])
    close(maps.heatmaps, torch.from_numpy(cam(images, None)), atol=1e-4, rtol=0)


def test_scorecam_of_constant_channels_is_finite():
    model, images = models.randomised(Convnet()), models.pictures((20, 28))
    with torch.no_grad():
        model.second.weight[1] = 0
    assert ScoreCAM("second")(model, images).raw.isfinite().all()


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_scorecam_with_a_target_function_of_the_whole_batch_equals_one_target_per_image(batch_size):
    model, images = models.randomised(Convnet()), models.pictures(32, 3)
    targets = torch.tensor([1, 3, 2])
    method = ScoreCAM("second", batch_size=batch_size)
    expected = method(model, images, target=targets)
    found = method(model, images, target=lambda output: output[torch.arange(3), targets])
    torch.testing.assert_close(found.raw, expected.raw)
