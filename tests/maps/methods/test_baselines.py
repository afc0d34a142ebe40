"""Methods that need no layer match their equations in slow loops, and find evidence that is known."""

import sys

import cv2
import numpy as np
import pytest
import torch
from torch import nn

from tests.capture import models
from tests.refusals import refuses
from visionattn.errors import UsageError
from visionattn.maps import RISE, IntegratedGradients, Occlusion, SmoothGrad

captum = pytest.importorskip("captum.attr")
close = torch.testing.assert_close


class Smooth(nn.Module):
    """A small network without kinks, so that sums converge to integrals quickly."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 5, 3)
        self.head = nn.Linear(4, 3)

    def forward(self, images):
        return self.head(self.conv(images).tanh().square().mean((2, 3)))


class Patch(nn.Module):
    """The score of class 1 is the mean of one patch; class 0 has the score 0."""

    def forward(self, images):
        score = images[:, :, 8:16, 12:20].mean((1, 2, 3))
        return torch.stack([0 * score, score], 1)


def gradient(model, image, target):
    image = image.clone().requires_grad_()
    (found,) = torch.autograd.grad(model(image[None])[0, target], image)
    return found


@pytest.fixture(scope="module")
def smooth():
    return models.randomised(Smooth()), models.pictures((20, 36), batch=2)


def in_cells(pixels, side):
    """Return the means over cells; the last row and column have fewer pixels if the sides are no multiple of it."""
    rows = [torch.stack([cell.mean((1, 2)) for cell in row.split(side, 2)], 1) for row in pixels.split(side, 1)]
    return torch.stack(rows, 1)


@pytest.mark.parametrize(("batch_size", "cell"), [(1, 1), (7, 4)])
def test_integrated_gradients_match_their_equation(smooth, batch_size, cell):
    model, images = smooth
    expected = []
    for image in images:
        points = (torch.arange(200) + 0.5) / 200
        mean = torch.stack([gradient(model, point * image, 1) for point in points]).mean(0)
        with torch.no_grad():
            change = (model(image[None]) - model(0 * image[None]))[0, 1]
        close((image * mean).sum(), change, atol=1e-4, rtol=1e-3)  # the loop is right: it is complete
        expected.append((image * mean).sum(0))
    maps = IntegratedGradients(batch_size=batch_size, cell=cell)(model, images, target=1)
    close(maps.raw, in_cells(torch.stack(expected), cell).clamp(min=0), atol=1e-5, rtol=1e-3)
    assert maps.source == "the image"


@pytest.mark.parametrize(("noise", "cell"), [(0.0, 1), (0.2, 4)])
def test_smoothgrad_matches_its_equation(smooth, noise, cell):
    model, images = smooth
    expected = []
    for image in images:
        generator = torch.Generator().manual_seed(4)
        found = []
        for _ in range(6):
            sigma = noise * float(image.max() - image.min())
            found.append(gradient(model, image + sigma * torch.randn(image.shape, generator=generator), 2))
        expected.append((sum(found) / 6).abs().amax(0))
    found = SmoothGrad(samples=6, noise=noise, cell=cell, seed=4)(model, images, target=2).raw
    close(found, in_cells(torch.stack(expected), cell))
    if noise == 0:
        saliency = captum.Saliency(model).attribute(images.clone().requires_grad_(), target=2)
        close(torch.stack(expected), saliency.amax(1))


def test_smoothgrad_agrees_with_captum_up_to_the_noise(smooth):
    model, images = smooth
    torch.manual_seed(0)
    sigma = 0.15 * float(images[0].max() - images[0].min())
    tunnel = captum.NoiseTunnel(captum.Saliency(model))
    options = {"nt_samples": 400, "nt_samples_batch_size": 50, "stdevs": sigma, "abs": False, "target": 1}
    theirs = tunnel.attribute(images[:1].clone().requires_grad_(), **options)
    ours = SmoothGrad(samples=400, cell=1)(model, images[:1], target=1).raw
    assert float(torch.corrcoef(torch.stack([ours.flatten(), theirs.abs().amax(1).flatten()]))[0, 1]) > 0.98


@pytest.mark.filterwarnings("ignore:.*show nothing")  # hiding a square may raise the score everywhere
@pytest.mark.parametrize(("size", "stride", "batch_size"), [(5, 2, 1), (8, 4, 64), (3, 2, 7), (None, None, 9)])
def test_occlusion_matches_its_definition(smooth, size, stride, batch_size):
    model, images = smooth
    method = Occlusion(size=size, stride=stride, batch_size=batch_size)
    size, stride = size or 3, stride or 1  # a seventh of 20 pixels, and its half
    expected, squares = torch.zeros(2, 20, 36), 0
    counts = torch.zeros(20, 36)
    with torch.no_grad():
        before = model(images)[:, 2]
        for top in range(0, 20, stride):
            for left in range(0, 36, stride):
                if (top and top - stride + size >= 20) or (left and left - stride + size >= 36):
                    continue  # the square before already reached the border
                hidden = images.clone()
                hidden[:, :, top : top + size, left : left + size] = 0
                fall = before - model(hidden)[:, 2]
                expected[:, top : top + size, left : left + size] += fall[:, None, None]
                counts[top : top + size, left : left + size] += 1
                squares += 1
    expected = in_cells(expected / counts, stride).clamp(min=0)
    close(method(model, images, target=2).raw, expected, atol=1e-5, rtol=1e-3)
    assert method.passes(model, images) == squares + 2


@pytest.mark.parametrize(("batch_size", "cells", "side"), [(1, 4, 1), (8, 2, 2)])
def test_rise_matches_its_equation(smooth, batch_size, cells, side):
    model, images = smooth
    generator = torch.Generator().manual_seed(3)
    expected = torch.zeros(2, 20, 36)
    with torch.no_grad():
        for _ in range(15):
            grid = (torch.rand(cells, cells, generator=generator) < 0.3).float().numpy()
            high, wide = 20 // cells, 36 // cells
            large = cv2.resize(grid, ((cells + 1) * wide, (cells + 1) * high), interpolation=cv2.INTER_LINEAR)
            top, left = (int(torch.randint(most, (), generator=generator)) for most in (high, wide))
            mask = torch.from_numpy(large[top : top + 20, left : left + 36])
            for number, image in enumerate(images):
                expected[number] += model((image * mask)[None]).softmax(1)[0, 1] * mask
    method = RISE(masks=15, cells=cells, keep=0.3, batch_size=batch_size, seed=3)
    expected = in_cells(expected / (15 * 0.3), side)
    close(method(model, images, target=1).raw, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", [IntegratedGradients(cell=4), SmoothGrad(cell=4), Occlusion(), RISE(masks=400)])
@pytest.mark.parametrize("target", [None, 1, torch.tensor([1, 1]), lambda output: output[:, 1]])
def test_the_peak_lies_on_the_evidence(method, target):
    images = 1 + 0.1 * models.pictures((24, 32), batch=2)
    maps = method(Patch(), images, target=target)
    for heatmap in maps.heatmaps:
        row, column = np.unravel_index(int(heatmap.argmax()), heatmap.shape)
        assert 8 <= (row + 0.5) * 24 / heatmap.shape[0] < 16
        assert 12 <= (column + 0.5) * 32 / heatmap.shape[1] < 20


@pytest.mark.parametrize("method", [IntegratedGradients(steps=3), SmoothGrad(samples=3), Occlusion(), RISE(masks=20)])
def test_a_target_function_gets_whole_batches_in_order(method):
    images = 1 + 0.1 * models.pictures((24, 32), batch=3)
    scale = torch.tensor([1.0, 0.5, 3.0])
    raw = method(Patch(), images, target=lambda output: output[:, 1] * scale).raw
    close(raw, method(Patch(), images, target=lambda output: output[:, 1]).raw * scale[:, None, None])


@pytest.mark.parametrize("method", [IntegratedGradients, Occlusion])
def test_without_captum_the_error_names_the_extra(method, monkeypatch):
    monkeypatch.setitem(sys.modules, "captum.attr", None)
    message = rf"{method.name} needs captum: run: python -m pip install 'visionattn\[baselines\]'"
    refuses(UsageError, message, method(), Patch(), torch.ones(1, 3, 24, 32))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: IntegratedGradients(steps=0), "steps must be at least 1, got 0"),
        (lambda: IntegratedGradients(batch_size=0), "batch_size must be at least 1, got 0"),
        (lambda: SmoothGrad(samples=0), "samples must be at least 1, got 0"),
        (lambda: SmoothGrad(noise=-1.0), "noise must be a finite number of at least 0, got -1.0"),
        (lambda: Occlusion(size=0), "size must be at least 1, got 0"),
        (lambda: Occlusion(size=4, stride=5), "stride must be at least 1 and at most size, got 5 and size 4"),
        (lambda: RISE(masks=0), "masks must be at least 1, got 0"),
        (lambda: RISE(keep=1.0), "keep must be between 0 and 1, got 1.0"),
        (
            lambda: Occlusion(size=30)(Patch(), torch.ones(1, 3, 24, 32)),
            "occlusion hides squares of 30 pixels, and the shorter side of the image has 24",
        ),
    ],
)
def test_wrong_arguments_are_errors(make, message):
    refuses(UsageError, message, make)


@pytest.mark.parametrize("method", [IntegratedGradients(), SmoothGrad()])
def test_a_model_that_computes_without_gradients_is_refused(method):
    class Without(Patch):
        @torch.no_grad()
        def forward(self, images):
            return super().forward(images)

    message = f"{method.name} needs the gradient of the score .* use occlusion or rise"
    refuses(UsageError, message, method, Without(), torch.ones(1, 3, 24, 32))
