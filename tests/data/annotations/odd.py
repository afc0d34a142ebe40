"""Shorthands for tests of annotation files."""

import numpy as np

from visionattn.data import AnnotatedData, Preprocess


def boxes_of(report):
    """Return split → for each image, its rows [label, x1, y1, x2, y2]."""
    return {
        split: [np.c_[image.labels, image.boxes].round(3).tolist() for image in images]
        for split, images in report.splits.items()
    }


def data(root, **options):
    """Return the data module of a folder, letterboxed to 64 × 64."""
    return AnnotatedData(str(root), num_workers=0, preprocess=Preprocess(64, fit="letterbox"), **options)
