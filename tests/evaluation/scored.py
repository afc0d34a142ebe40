"""A model that uses only one known region of the image, methods for this model, and images."""

import torch
from torch import nn

from visionattn.maps.method import Explanation, Method


class Patch(nn.Module):
    """Give class 1 a score that grows with the mean brightness of the region, and ignore all other pixels."""

    def __init__(self, region_HW, gain=12.0):
        super().__init__()
        self.region = nn.Parameter(region_HW.float() / region_HW.sum() * gain)
        self.bias = nn.Parameter(torch.tensor([gain / 2]))

    def forward(self, images_BCHW):
        evidence_B = (images_BCHW.mean(1) * self.region).sum((1, 2)) - self.bias
        return torch.stack([-evidence_B, evidence_B], 1)


class Fixed(Method):
    """Return the given map for every image, or one given map per image, for any model."""

    name = "fixed"

    def __init__(self, heatmap):
        self.heatmap = heatmap

    def explain(self, model, images_BCHW, target):
        maps = self.heatmap if self.heatmap.ndim == 3 else self.heatmap.expand(len(images_BCHW), -1, -1)
        return Explanation(maps[: len(images_BCHW)], model(images_BCHW), None, "nothing")


class TrueMap(Method):
    """The weights that `Patch` gives to the pixels, which are its true heatmap."""

    name = "weights"

    def explain(self, model, images_BCHW, target):
        return Explanation(model.region.expand(len(images_BCHW), -1, -1), model(images_BCHW), None, "region")


def region(size=(12, 16), box=(2, 3, 8, 9)):
    """Return the mask of a box (x, y, x, y) in pixels."""
    filled = torch.zeros(size, dtype=torch.bool)
    filled[box[1] : box[3], box[0] : box[2]] = True
    return filled


def bright_pictures(region_HW, count=24, channels=3, seed=0):
    """Return noise images with mean 1 in the region and 0 elsewhere. `Patch` predicts class 1 for all of them."""
    noise = 0.3 * torch.randn(count, channels, *region_HW.shape, generator=torch.Generator().manual_seed(seed))
    return noise + region_HW
