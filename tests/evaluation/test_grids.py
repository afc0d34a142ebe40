"""The grid pointing game equals a slow loop, on images of known classes."""

import pytest
import torch
from torch import nn

from tests.capture import models
from tests.refusals import refuses
from visionattn.errors import UsageError
from visionattn.evaluation import grid_pointing, image_grids
from visionattn.maps import GradCAM
from visionattn.maps.method import Explanation, Method

SIDES = 6, 8
CLASSES = torch.tensor([0, 1, 2, 3, 0, 1])


class Brightness(nn.Module):
    """Classify an image by its brightest channel; images of any size."""

    def forward(self, images_BCHW):
        return images_BCHW.amax((2, 3))


class ShowsClass(Method):
    """Return the channel of the explained class: on a grid, only images of this class are hot."""

    name = "shows class"

    def explain(self, model, images_BCHW, target):
        output = model(images_BCHW)
        chosen = images_BCHW[torch.arange(len(images_BCHW)), target]
        return Explanation(chosen, output, target, "channels")


def pictures():
    """Return images of six rows, whose pixels have their own number and the class as the bright channel."""
    images = torch.zeros(len(CLASSES), 4, *SIDES)
    for index, label in enumerate(CLASSES):
        images[index, label] = 1 + index
    return images


def test_every_grid_holds_the_image_and_images_of_other_classes():
    images = pictures()
    grids = image_grids(Brightness(), images, CLASSES)
    assert grids.images.shape == (6, 4, 12, 16)
    assert grids.valid.all()
    for index, own in enumerate(grids.own.tolist()):
        cells = grids.images[index].unfold(1, 6, 6).unfold(2, 8, 8).permute(1, 2, 0, 3, 4).flatten(0, 1)
        assert torch.equal(cells[own], images[index])
        found = [next(i for i, image in enumerate(images) if torch.equal(cell, image)) for cell in cells]
        assert sorted(CLASSES[found].tolist()) == [0, 1, 2, 3]  # as many classes as cells
    assert len(set(grids.own.tolist())) > 1
    again, other = (image_grids(Brightness(), images, CLASSES, seed=seed) for seed in (0, 1))
    assert torch.equal(again.images, grids.images)
    assert not torch.equal(other.images, grids.images)


def test_grid_pointing_is_1_for_a_map_of_the_class_and_a_quarter_for_a_constant_map():
    images = pictures()
    grids = image_grids(Brightness(), images, CLASSES)
    assert grid_pointing(Brightness(), grids, CLASSES, ShowsClass()).tolist() == [1] * 6

    class Flat(Method):
        name = "flat"

        def explain(self, model, images_BCHW, target):
            return Explanation(torch.zeros(len(images_BCHW), 3, 4), model(images_BCHW), None, "nothing")

    with pytest.warns(match="show nothing"):
        assert grid_pointing(Brightness(), grids, CLASSES, Flat()).tolist() == [0.25] * 6


def test_grid_pointing_equals_a_slow_loop_for_gradcam():
    model, images = models.resnet().eval(), models.pictures(batch=4)
    classes = torch.tensor([0, 1, 2, 3])
    grids = image_grids(model, images, classes, seed=3)
    assert grids.images.shape[2:] == (2 * images.shape[2], 2 * images.shape[3])
    found = grid_pointing(model, grids, classes, GradCAM())
    height, width = images.shape[2:]
    for index, own in enumerate(grids.own.tolist()):
        heat = GradCAM()(model, grids.images[index : index + 1], target=index).heatmaps
        fine = nn.functional.interpolate(heat[:, None].double(), (2 * height, 2 * width), mode="bilinear")[0, 0]
        top, left = own // 2 * height, own % 2 * width
        part = fine[top : top + height, left : left + width].sum() / fine.sum()
        assert float(found[index]) == pytest.approx(float(part), abs=1e-5)


def test_a_model_of_one_image_size_gets_smaller_grids():
    images = models.pictures(batch=4)
    grids = image_grids(models.vit().eval(), images, torch.arange(4))
    assert grids.images.shape == images.shape
    one, cells = grids.images[2], nn.functional.avg_pool2d(images, 2)
    own = int(grids.own[2])
    top, left = own // 2 * cells.shape[2], own % 2 * cells.shape[3]
    torch.testing.assert_close(one[:, top : top + cells.shape[2], left : left + cells.shape[3]], cells[2])


def test_images_without_enough_others_have_no_value():
    images = pictures()[:5]
    classes = torch.tensor([0, 0, 0, 0, 1])  # four others for the last image, one other for the first four
    grids = image_grids(Brightness(), images, classes)
    assert grids.valid.tolist() == [False] * 4 + [True]
    with pytest.warns(match="4 of 5 shows class heatmaps"):  # of grids that repeat the image itself
        scores = grid_pointing(Brightness(), grids, classes, ShowsClass())
    assert scores.isnan().tolist() == [True] * 4 + [False]


def test_a_grid_of_one_image_is_an_error():
    refuses(
        UsageError, "at least 2 × 2 cells, got 1 × 1", lambda: image_grids(Brightness(), pictures(), CLASSES, cells=1)
    )
