"""Small detectors, and a batch of images of shapes to test them."""

import torch

from tests.shapes import Shapes
from visionattn.models import DenseDetector, FeaturePyramid, QueryDetector

SMALL = {"channels": (8, 16, 24, 32), "stem_width": 4, "layers": (1, 1, 1, 1)}
VIT = {"img_size": 64, "embed_dim": 32, "depth": 2, "num_heads": 2}


def pyramid(backbone="resnet10t", **options):
    defaults = {"resnet10t": SMALL, "vit_tiny_patch16_224": VIT}
    return FeaturePyramid(backbone, **{"channels": 32, "options": defaults.get(backbone, {}), **options})


def dense(**options):
    return DenseDetector(pyramid(**options), 4, depth=1)


def query(**options):
    return QueryDetector(pyramid(**options), 4, queries=20, layers=2, heads=4, points=2, hidden=32, depth=1, noised=20)


def batch(count=4, side=64, seed=0):
    samples = Shapes(count, seed=seed, side=side).samples
    images = torch.stack([sample["image"] for sample in samples])
    return images, [sample["boxes"] for sample in samples], [sample["labels"] for sample in samples]


def learn(detector, images, boxes, labels, steps, lr=5e-3):
    """Train a detector on one batch, and return it in evaluation mode."""
    optimizer = torch.optim.AdamW(detector.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(detector.train().losses(images, boxes, labels).values()).backward()
        torch.nn.utils.clip_grad_norm_(detector.parameters(), 1.0)
        optimizer.step()
    return detector.eval()
