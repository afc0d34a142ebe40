"""Controls equal their definitions, and do not depend on the model."""

import math

import cv2
import pytest
import torch

from tests.capture import models
from tests.capture.models import assert_same_state, state_of
from tests.refusals import refuses
from visionattn.errors import UsageError
from visionattn.evaluation import CentreGaussian, Edges, RandomMap

close = torch.testing.assert_close


@pytest.mark.parametrize("control", [RandomMap((5, 3)), CentreGaussian(), Edges(), Edges((4, 4))])
def test_a_control_is_called_as_a_method_and_does_not_depend_on_the_model(control):
    model, images = models.vit(), models.pictures(batch=3)
    before = state_of(model)
    maps = control(model, images, target=2)
    assert_same_state(before, state_of(model))
    assert maps.heatmaps.amin((1, 2)).tolist() == [0, 0, 0]
    assert maps.heatmaps.amax((1, 2)).tolist() == [1, 1, 1]
    assert maps.target is None
    close(maps.output, model(images).detach(), atol=1e-5, rtol=1e-5)
    assert torch.equal(maps.raw, control(models.vit(depth=2), images).raw)
    for b in range(3):  # the map of an image does not depend on the other images of the batch
        assert torch.equal(maps.raw[b], control(model, images[b : b + 1]).raw[0])


def test_random_maps_are_uniform_and_independent():
    images = torch.randn(400, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    raw = RandomMap((6, 7)).draw(images)
    assert raw.shape == (400, 6, 7)
    values = raw.flatten().sort().values
    uniform = torch.linspace(0, 1, len(values))
    assert float((values - uniform).abs().max()) < 1.63 / len(values) ** 0.5  # Kolmogorov-Smirnov test at 1 %
    correlations = torch.corrcoef(raw.flatten(1).T).fill_diagonal_(0)
    assert float(correlations.abs().max()) < 5 / math.sqrt(400)
    assert not torch.equal(raw, RandomMap((6, 7), seed=1).draw(images))


@pytest.mark.parametrize("size", [(8, 8), (5, 12)])
def test_gaussian_equals_its_equation(size):
    height, width = size
    (raw,) = CentreGaussian(sigma=0.2).draw(torch.zeros(1, 3, *size))
    for i in range(height):
        for j in range(width):
            y, x = (i + 0.5) / height - 0.5, (j + 0.5) / width - 0.5
            assert float(raw[i, j]) == pytest.approx(math.exp(-(x * x + y * y) / (2 * 0.2**2)), rel=1e-4)


@pytest.mark.parametrize("shape", [(1, 9, 14), (3, 8, 8), (4, 1, 5)])
def test_edges_equal_opencvs_sobel(shape):
    images = torch.randn(2, *shape)
    fine = Edges().draw(images)
    for image, found in zip(images, fine, strict=True):
        grey = image.mean(0).numpy()
        gx, gy = (cv2.Sobel(grey, cv2.CV_32F, *d, ksize=3, borderType=cv2.BORDER_REPLICATE) for d in ((1, 0), (0, 1)))
        close(found, torch.from_numpy((gx * gx + gy * gy) ** 0.5), atol=1e-5, rtol=1e-4)


def test_coarse_edges_are_the_mean_of_each_cell():
    images = torch.randn(2, 3, 8, 12)
    fine = Edges().draw(images)
    close(Edges((4, 3)).draw(images), fine.view(2, 4, 2, 3, 4).mean((2, 4)))


def test_wrong_options_of_controls_are_errors():
    for control in (RandomMap, Edges):
        refuses(UsageError, "grid must be at least 1×1, got 0×3", control, (0, 3))
    refuses(UsageError, "sigma must be > 0", CentreGaussian, sigma=0)
