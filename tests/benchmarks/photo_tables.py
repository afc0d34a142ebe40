"""Make two data sets from a folder of photographs with train/ and val/ and a folder for each class, as in `flowers5`.

    python tests/benchmarks/photo_tables.py PHOTOS OUT

- OUT/grids/labels.csv: pictures of 2 × 2 photographs, with the classes in each picture as its labels.
- OUT/long_tail.csv: one label each. The classes have 100, 50, 25, 12 and 6 of their training photographs.

Training pictures are made of the photographs in train/. Of each class in val/, every second photograph is for
validation, and the others are for the test. `configs/labels/README.md` has the figures of trainings on both.
"""

import argparse
import csv
import os
from pathlib import Path

import cv2
import numpy as np

from visionattn.data import read_image, write_image

CELL = 96  # pixels, side of a photograph in a grid
GRIDS = {"train": 800, "val": 150, "test": 200}
TAIL = (100, 50, 25, 12, 6)


def photographs(root):
    """Return split → class → its photographs."""
    splits = {"train": {}, "val": {}, "test": {}}
    for folder in sorted((root / "train").iterdir()):
        splits["train"][folder.name] = sorted(folder.iterdir())
        held_out = sorted((root / "val" / folder.name).iterdir())
        splits["val"][folder.name], splits["test"][folder.name] = held_out[::2], held_out[1::2]
    return splits


def square(path):
    """Read the central square of a photograph, resized to a cell."""
    picture = read_image(path)
    side = min(picture.shape[:2])
    top, left = (picture.shape[0] - side) // 2, (picture.shape[1] - side) // 2
    return cv2.resize(picture[top : top + side, left : left + side], (CELL, CELL), interpolation=cv2.INTER_AREA)


def grid(by_class, random):
    """Return a picture of four photographs, (2 · CELL, 2 · CELL, 3) uint8, and their one to three classes."""
    names = random.choice(list(by_class), random.integers(1, 4), replace=False)
    chosen = [str(name) for name in (*names, *random.choice(names, 4 - len(names)))]
    cells = [square(by_class[name][random.integers(len(by_class[name]))]) for name in random.permutation(chosen)]
    return np.vstack([np.hstack(cells[:2]), np.hstack(cells[2:])]), sorted(set(chosen))


def write_table(path, rows, header):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    splits = photographs(options.photos)
    (options.out / "grids").mkdir(parents=True, exist_ok=True)
    random, rows = np.random.default_rng(0), []
    for split, count in GRIDS.items():
        for number in range(count):
            picture, labels = grid(splits[split], random)
            write_image(options.out / "grids" / f"{split}_{number:03d}.jpg", picture)
            rows.append([f"{split}_{number:03d}.jpg", "|".join(labels), split])
    write_table(options.out / "grids" / "labels.csv", rows, ("path", "labels", "split"))
    rows = [
        [os.path.relpath(path, options.out), name, split]
        for split, by_class in splits.items()
        for (name, paths), most in zip(by_class.items(), TAIL, strict=True)
        for path in paths[: most if split == "train" else None]
    ]
    write_table(options.out / "long_tail.csv", rows, ("path", "label", "split"))


if __name__ == "__main__":
    main()
