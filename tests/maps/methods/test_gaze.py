"""Heatmaps of glimpses cover the pixels that the glimpses read."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from tests.capture import models
from tests.maps.glimpses import images, network
from visionattn.attention import Categorical, Gaussian, Retina
from visionattn.capture import NoWeights, capture
from visionattn.errors import MapWarning, UsageError
from visionattn.evaluation import score
from visionattn.maps import METHODS, Gaze, GradCAM, RawAttention, default_method, methods_that_fit
from visionattn.maps.methods.gaze import coverage
from visionattn.models import ConvEncoder

close = torch.testing.assert_close


class Reader(nn.Module):
    """A network with a retina, of another class than `GlimpseNetwork`. It takes two simultaneous glimpses, twice."""

    def __init__(self):
        super().__init__()
        self.eye = Retina(3, scales=2)
        self.head = nn.Linear(9, 5)

    def forward(self, x):
        first = torch.tensor([[-1.0, 1.0], [0.5, 0.0]]).expand(len(x), 2, 2)
        means = self.eye(x, first).mean((1, 2, 3)) + self.eye(x, -first).mean((1, 2, 3))
        return self.head(means.flatten(1))


def test_a_network_of_another_class_with_a_retina_is_recorded():
    model, x = Reader(), images()
    with torch.no_grad(), capture(model, NoWeights()) as records:
        model(x)
    (record,) = records
    assert record.name == "eye"
    assert record.locations.shape == (3, 2, 2, 2)  # 3 images, 2 simultaneous glimpses, 2 times, (x, y)
    maps = Gaze()(model, x)
    assert maps.boxes.shape == (3, 4, 2, 4)
    centre = (maps.boxes[0, :, 0, :2] + maps.boxes[0, :, 0, 2:]) / 2
    # two locations, then their negatives, in the order of the glimpses
    close(centre, torch.tensor([[0.5, 11.5], [11.5, 6.5], [14.5, 0.5], [4.5, 6.5]]))


@pytest.mark.parametrize("subpixel", [False, True])
@pytest.mark.parametrize("patch_size", [4, (3, 5)])
@pytest.mark.parametrize(("height", "width"), [(12, 16), (32, 8)])
def test_a_heatmap_is_the_derivative_of_the_sum_of_all_patches(patch_size, subpixel, height, width):
    """Compare with the derivative of the sum of all patches with respect to the pixels."""
    model, x = network(patch_size, scales=3, subpixel=subpixel), images(height, width)
    maps = Gaze()(model, x)
    location = model.rollout(x, locations="mean").location.detach()
    assert location[:, 0].std() > 0.2  # the glimpses differ, so the test covers more than one location
    pixels = x.clone().requires_grad_()
    model.retina(pixels, location[:, 0]).sum().backward()
    derivative = pixels.grad[:, 0]
    if subpixel:  # the map holds the mean of the derivative over the 4 × 4 pixels that the widest scale averages
        close(nn.functional.avg_pool2d(maps.raw, 4), nn.functional.avg_pool2d(derivative, 4), rtol=1e-4, atol=1e-4)
    else:
        close(maps.raw, derivative, rtol=1e-4, atol=1e-4)
    assert maps.heatmaps.amin() == 0
    assert maps.heatmaps.amax() == 1
    assert maps.source == "glimpses of retina"


def test_coverage_matches_its_equation():
    generator = torch.Generator().manual_seed(2)
    corner = 12 * torch.rand(2, 3, 1, 2, generator=generator) - 3
    boxes = torch.cat([torch.cat([corner - grow, corner + 2.5 + grow], -1) for grow in (0.0, 1.25)], 2)
    expected = torch.zeros(2, 8, 6)
    for b, t, s, y, x in itertools.product(range(2), range(3), range(2), range(8), range(6)):
        left, top, right, bottom = boxes[b, t, s].tolist()
        inside = max(0, min(right, x + 1) - max(left, x)) * max(0, min(bottom, y + 1) - max(top, y))
        expected[b, y, x] += inside * (1.0, 0.25)[s]
    close(coverage(boxes, (8, 6)), expected)


@pytest.mark.parametrize(("row", "column"), [(0, 0), (11, 14), (4, 9), (0, 14)])
def test_boxes_cover_the_pixels_that_the_glimpses_read(row, column):
    """In an image with one bright pixel, a patch has the sum 0.25^scale if its box contains the pixel, otherwise 0."""
    model, x = network(3, scales=2, num_glimpses=6), torch.zeros(1, 1, 12, 15)
    x[0, 0, row, column] = 1
    maps = Gaze()(model, x)
    location = model.rollout(x, locations="mean").location
    patches = model.retina(x, location[:, 0])[0, :, :, 0]
    for glimpse, scale in itertools.product(range(6), range(2)):
        left, top, right, bottom = maps.boxes[0, glimpse, scale].tolist()
        contains = left <= column < right and top <= row < bottom
        assert float(patches[glimpse, scale].sum()) == contains * 0.25**scale, (glimpse, scale)
        if contains and scale == 0:  # the pixel is at the right position in the patch
            assert patches[glimpse, scale, row - int(top), column - int(left)] == 1


@pytest.mark.parametrize("patch_size", [3, 4, (5, 2)])
@pytest.mark.parametrize("scales", [1, 3])
def test_boxes_round_half_pixels_as_the_patches_do(patch_size, scales):
    """Centres of grid cells often lie halfway between pixels. Each pixel holds its coordinates, so a patch shows where
    it was read."""
    retina, compared = Retina(patch_size, scales=scales), 0
    for grid, size in itertools.product(range(2, 13), range(15, 46, 3)):
        location = Categorical(4, grid=grid).centres[None]
        y, x = torch.meshgrid(torch.arange(size), torch.arange(size + 1), indexing="ij")
        patches = retina(torch.stack([x, y])[None].float(), location)[0, :, :, :, 0, 0]
        boxes = retina.boxes(location, (size, size + 1))[0]
        for scale in range(scales):
            inside = (boxes[:, scale, :2] >= 0).all(-1)  # boxes whose top left corner lies in the image
            first = patches[inside, scale] - (2**scale - 1) / 2
            close(boxes[inside, scale, :2], first, rtol=0, atol=0)
            compared += int(inside.sum())
    assert compared > 1000  # enough boxes lay inside


def test_the_map_of_two_retinas_is_the_sum_of_both():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = Retina(2), Retina(3, scales=3)

        def forward(self, x):
            centre = torch.zeros(len(x), 1, 2)
            return (
                self.near(x, centre).mean((1, 2, 3))[:, :, 0] + self.far(x, centre + 0.3).mean((1, 2, 3))[:, :, 0].sum()
            )

    x = images()
    maps = Gaze()(Both(), x)
    assert maps.source == "glimpses of near, far"
    assert maps.boxes.shape == (3, 2, 3, 4)
    pixels = x.clone().requires_grad_()
    model, centre = Both(), torch.zeros(3, 1, 2)
    (model.near(pixels, centre).sum() + model.far(pixels, centre + 0.3).sum()).backward()
    close(maps.raw, pixels.grad[:, 0])


@pytest.mark.parametrize("channels", [1, 3])
def test_gaze_is_the_default_method_of_a_glimpse_network(channels):
    model = network(channels=channels)
    assert isinstance(default_method(model), Gaze)  # no example is needed, whatever the number of channels
    assert list(methods_that_fit(model, images(channels=channels))) == ["gaze"]
    assert not isinstance(default_method(models.vit()), Gaze)


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (GradCAM, "no output of this GlimpseNetwork lies on a grid, so no class activation map fits"),
        (RawAttention, "raw needs attention over positions; this GlimpseNetwork has none"),
        (METHODS["gate"], "gate needs gates over positions; this GlimpseNetwork has glimpses and no gates"),
        (METHODS["chefer"], "chefer needs attention over positions; this GlimpseNetwork has none"),
    ],
)
@pytest.mark.parametrize("policy", [Gaussian, Categorical])
def test_other_methods_raise_errors_for_a_glimpse_network(method, message, policy):
    """The encoder's features of a patch have the shape of a feature map, but do not lie on a grid of the image."""
    model = network(8, encoder=ConvEncoder, policy=policy)
    with pytest.raises(UsageError) as caught:
        method()(model, images())
    any_model = "occlusion, rise, integrated_gradients, smoothgrad"
    assert str(caught.value) == f"{message}. Methods that fit: gaze, {any_model}."


def test_gaze_of_a_network_without_a_retina_is_an_error():
    with pytest.raises(UsageError, match=r"gaze needs a network that looks through a Retina; this ResNet has none\. M"):
        Gaze()(models.resnet("seresnet18"), models.pictures())


def test_a_retina_that_reads_another_image_than_the_input_is_an_error():
    class HalfSize(Reader):
        def forward(self, x):
            return super().forward(x[..., ::2, ::2])

    message = r"eye looks at 3 images of \(6, 8\), but the model was called with 3 images of \(12, 15\)"
    with pytest.raises(UsageError, match=message):
        Gaze()(HalfSize(), images())


def test_gradient_methods_fit_a_network_that_also_reads_the_whole_image():
    model = network(channels=3, glance=lambda channels: Glance(channels))
    fitting = list(methods_that_fit(model, images(channels=3)))
    assert fitting[0] == "gaze"
    assert {"eigencam", "gradcam", "gradcam++", "layercam"} <= set(fitting)
    maps = GradCAM()(model, images(32, 32, channels=3))
    assert maps.raw.shape == (3, 16, 16)
    assert maps.source == "glance.layers"


class Glance(nn.Module):
    out_features = 4

    def __init__(self, channels):
        super().__init__()
        self.layers = nn.Conv2d(channels, 4, 3, stride=2, padding=1)

    def forward(self, x):
        return self.layers(x).relu().mean((2, 3))


def test_a_network_that_covers_all_pixels_equally_gives_a_constant_map_and_a_warning():
    with pytest.warns(MapWarning, match="gaze heatmaps of glimpses of retina are constant"):
        Gaze()(network(64, scales=1, num_glimpses=1), images())


def test_metrics_score_the_heatmaps_of_gaze():
    model = network(6, num_glimpses=2)
    batch = {"image": images(24, 24, batch=12), "box": torch.tensor([[4.0, 4, 12, 12]] * 12)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)
        scores = score(model, [batch], steps=4, copies=1)
    assert list(scores.controls) == ["gaze"]
    assert not scores.failed
    assert scores.metrics == ["deletion", "insertion", "pointing", "energy", "iou", "shuffled"]
