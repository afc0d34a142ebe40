"""Small pictures with any of three coloured shapes, and tables of their labels."""

import csv

import numpy as np
from PIL import Image

SHAPES = {"bar": (220, 60, 40), "disc": (40, 200, 80), "square": (60, 90, 230)}


def shapes(labels, random, side=32):
    """Draw a noisy picture, (side, side, 3) uint8, with one shape for each label, at a random place."""
    picture = random.integers(90, 150, (side, side, 3)).astype(np.uint8)
    rows, columns = np.mgrid[0:side, 0:side]
    for label in labels:
        y, x = random.integers(8, side - 8, 2)
        inside = {
            "bar": (abs(rows - y) < 2) & (abs(columns - x) < 8),
            "disc": (rows - y) ** 2 + (columns - x) ** 2 < 30,
            "square": (abs(rows - y) < 5) & (abs(columns - x) < 5),
        }[label]
        picture[inside] = SHAPES[label]
    return picture


def write_images(folder, count, *, single=False, seed=0):
    """Write pictures 000.png, …; return the labels of each: any subset of the shapes, or with `single` exactly one."""
    random = np.random.default_rng(seed)
    labels = {}
    for number in range(count):
        chosen = [name for name in SHAPES if random.random() < 0.5]
        chosen = [list(SHAPES)[number % 3]] if single else chosen
        labels[f"{number:03d}.png"] = chosen
        Image.fromarray(shapes(chosen, random)).save(folder / f"{number:03d}.png")
    return labels


def write_csv(path, rows, header=("path", "label")):
    """Write a CSV file and return its path as text."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return str(path)


def label_table(photos, folder):
    """Write a table of the images below `photos`, with the name of their folder as `label` and as `labels`."""
    images = sorted(path.relative_to(photos) for path in photos.rglob("*.*g"))
    rows = [[path.as_posix(), path.parent.name, path.parent.name] for path in images]
    return write_csv(folder / "labels.csv", rows, ("path", "label", "labels"))
