"""Toy detectors, whose scores depend on known cells of their maps."""

import torch
from torch import nn


class TwoMaps(nn.Module):
    """Maps of strides 1 and 2."""

    def forward(self, images):
        return [images * 2, nn.functional.avg_pool2d(images, 2)]


class ToyDetector(nn.Module):
    """Two boxes per image; the score of the first depends on the fine map only, and of the second on the coarse map."""

    def __init__(self):
        super().__init__()
        self.first = nn.Identity()
        self.features = TwoMaps()

    def forward(self, images):
        fine, coarse = self.features(self.first(images))
        score = [
            (fine[:, 0, 1, 2] + 2 * fine[:, 1, 1, 3]).sigmoid(),
            (coarse[:, 2, 0, 1] - coarse[:, 0, 0, 1]).sigmoid(),
        ]
        boxes = torch.tensor([[2.0, 1, 4, 2], [2, 0, 4, 2]])
        return [
            {"boxes": boxes, "scores": torch.stack([score[0][n], score[1][n]]), "labels": torch.tensor([0, 1])}
            for n in range(len(images))
        ]
