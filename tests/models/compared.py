"""Pictures of odd sizes, and how far two preparations of them differ."""

import numpy as np

QUICK = [(97, 131), (301, 203)]
ALL = [*QUICK, (224, 225), (40, 61), (517, 259), (385, 385)]


def pictures(sizes):
    random = np.random.default_rng(0)
    return [random.integers(0, 256, (*size, 3), dtype=np.uint8) for size in sizes]


def worst(preprocess, theirs, sizes, measure=np.max):
    """Return the largest difference of the inputs, in values of 255 of the picture."""
    std = np.asarray(preprocess.std)[:, None, None]
    return max(measure(np.abs((preprocess(x)[0] - np.asarray(theirs(x))) * std)) * 255 for x in pictures(sizes))
