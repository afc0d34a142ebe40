"""Test the scenes of several digits and their boxes."""

import numpy as np
import torch

from visionattn.data import DigitScenes, DigitScenesData


def test_boxes_of_digit_scenes_enclose_the_ink():
    scenes = DigitScenes("val", size=40, fragments=0, count=(0, 4))
    counts = set()
    for index in range(40):
        sample = scenes[index]
        ink = sample["image"][0].numpy() > -1 + 2 * 64.5 / 255
        counts.add(len(sample["boxes"]))
        covered = np.zeros_like(ink)
        for x1, y1, x2, y2 in sample["boxes"].int().tolist():
            assert ink[y1:y2, x1:x2].any(1).all() or len(sample["boxes"]) > 1
            assert ink[y1, x1:x2].any()
            assert ink[y1:y2, x1].any()
            assert ink[y2 - 1, x1:x2].any()
            covered[y1:y2, x1:x2] = True
        assert not (ink & ~covered).any()
    assert counts >= {0, 1, 2, 3}
    assert torch.equal(scenes[7]["image"], DigitScenes("val", size=40, fragments=0, count=(0, 4))[7]["image"])


def test_digits_of_a_scene_overlap_little():
    scenes = DigitScenes("train", size=60, count=(5, 5))
    pairs = 0
    for index in range(60):
        boxes = scenes[index]["boxes"].numpy()
        for number, first in enumerate(boxes):
            for second in boxes[:number]:
                sides = np.minimum(first[2:], second[2:]) - np.maximum(first[:2], second[:2])
                smaller = min((box[2:] - box[:2]).prod() for box in (first, second))
                assert sides.clip(0).prod() <= 0.2 * smaller + 1e-6
                pairs += (sides > 0).all()
    assert pairs > 50


def test_digit_scenes_form_batches():
    data = DigitScenesData(train_size=8, val_size=4, test_size=4, batch_size=4)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 96, 96)
    assert all(boxes.shape == (len(labels), 4) for boxes, labels in zip(batch["boxes"], batch["labels"], strict=True))
