"""A synthetic detection data set: ellipses, rectangles, triangles and crosses on a noisy background."""

import cv2
import numpy as np
import torch

NAMES = ("disc", "square", "triangle", "cross")


class Shapes(torch.utils.data.Dataset):
    """Square images with one to five shapes each.

    The size of a shape is .12 to .42 of the image's side (11 to 40 of 96 pixels). A shape is .7 to 1.4 times as wide as
    high, and the boxes of two shapes have an IoU below .1. Image `index` depends only on (seed, index).

    The background has smooth blotches around one colour, and noise with σ = 15 of 255. In at least one channel, the
    colour of a shape differs from the background's mean by 50 or more, so most shapes are easy to see.

    These numbers were chosen before any detector was tuned. The goals in `tests/benchmarks/detection.py` were
    measured on another data set. We only know that it has 512 images of shapes, each 96 pixels high and wide. The
    present images are no easier: torchvision's FCOS reached mAP50 .67 on them in 10 CPU seconds of a busy machine
    (`fcos_map50_10s`), and a similar head reached .91 on the other data set.
    """

    def __init__(self, size, *, seed=0, side=96, preload=True):
        self.size, self.seed, self.side = size, seed, side
        self.samples = [self.draw(index) for index in range(size)] if preload else None

    def __len__(self):
        return self.size

    def __getitem__(self, key):
        index = key[0] if isinstance(key, tuple) else key
        return self.samples[index] if self.samples else self.draw(index)

    def draw(self, index):
        random = np.random.default_rng([self.seed, index])
        side = self.side
        coarse = random.normal(0, 20, (6, 6, 3)).astype(np.float32) + random.uniform(60, 190, 3).astype(np.float32)
        ground = cv2.resize(coarse, (side, side), interpolation=cv2.INTER_CUBIC)
        picture = np.clip(ground + random.normal(0, 15, (side, side, 3)), 0, 255)
        boxes, labels = [], []
        for _ in range(random.integers(1, 6)):
            for _ in range(20):
                extent = random.uniform(0.12, 0.42) * side
                width, height = extent * np.sqrt(ratio := random.uniform(0.7, 1.4)), extent / np.sqrt(ratio)
                x1, y1 = random.uniform(0, side - width), random.uniform(0, side - height)
                box = np.array([x1, y1, x1 + width, y1 + height])
                if all(iou(box, other) < 0.1 for other in boxes):
                    break
            else:
                continue
            label = int(random.integers(len(NAMES)))
            mask = shape(label, box, side)
            colour = random.uniform(0, 255, 3)
            while abs(colour - coarse.mean((0, 1))).max() < 50:
                colour = random.uniform(0, 255, 3)
            picture = picture * (1 - mask) + colour * mask
            boxes.append(box)
            labels.append(label)
        return {
            "image": torch.from_numpy(picture.transpose(2, 0, 1) / 64 - 2).float(),
            "boxes": torch.tensor(np.array(boxes), dtype=torch.float32).reshape(-1, 4),
            "labels": torch.tensor(labels),
        }


def shape(label, box, side, fine=4):
    """Return the fraction of each pixel, (side, side, 1), that a shape covers. The shape fills its box."""
    x1, y1, x2, y2 = (box * fine).tolist()
    mask = np.zeros((side * fine, side * fine), np.uint8)
    middle = (x1 + x2) / 2, (y1 + y2) / 2
    if label == 0:
        axes = (round((x2 - x1) / 2), round((y2 - y1) / 2))
        cv2.ellipse(mask, (round(middle[0]), round(middle[1])), axes, 0, 0, 360, 255, -1)
    else:
        third = (x2 - x1) / 3, (y2 - y1) / 3
        corners = {
            1: [[(x1, y1), (x2, y1), (x2, y2), (x1, y2)]],
            2: [[(middle[0], y1), (x2, y2), (x1, y2)]],
            3: [
                [(x1, y1 + third[1]), (x2, y1 + third[1]), (x2, y2 - third[1]), (x1, y2 - third[1])],
                [(x1 + third[0], y1), (x2 - third[0], y1), (x2 - third[0], y2), (x1 + third[0], y2)],
            ],
        }[label]
        for part in corners:
            cv2.fillPoly(mask, [np.round(np.array(part)).astype(np.int32)], 255)
    return cv2.resize(mask, (side, side), interpolation=cv2.INTER_AREA)[..., None].astype(np.float32) / 255


def iou(a, b):
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    common = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    return common / (sum(areas) - common)
