"""Synthetic shapes: ellipses, rectangles, triangles and crosses of any colour on noise, with their boxes."""

import cv2
import numpy as np
import torch

NAMES = ("disc", "square", "triangle", "cross")


class Shapes(torch.utils.data.Dataset):
    """Images of `side` pixels with one to five shapes, .12 to .42 of the side in size (11 to 40 of 96 pixels) and .7 to
    1.4 times as wide as high, whose boxes overlap by an IoU below .1.

    Image `index` depends on (seed, index) alone.

    The ground is blotches of one colour under noise, σ 15 of 255; a shape differs from the ground's mean by 50 or more
    in one channel at least, so that most are plain to see and some are not. These numbers were chosen before any
    detector was tuned; for a while they were easier (19 to 43 pixels, at most four), and no figure of then is kept. The
    goals of `tests/benchmarks/detection.py` come from 512 images of shapes at 96 pixels of which nothing else is known.
    By torchvision's FCOS as a yardstick these are no easier: there a head of its kind reached mAP50 .91 in 10 CPU
    seconds, here it reached .67 on a busy machine (`fcos_map50_10s`).
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
    """(side, side, 1) coverage of a shape that fills its box."""
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


def iou(one, other):
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    common = max(0, width) * max(0, height)
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (one, other)]
    return common / (sum(areas) - common)
