"""Edit annotation files."""

import numpy as np

from visionattn.data import AnnotatedData, Preprocess


def boxes_of(report):
    return {
        split: [np.c_[image.labels, image.boxes].round(3).tolist() for image in images]
        for split, images in report.splits.items()
    }


def data(root, **options):
    return AnnotatedData(str(root), num_workers=0, preprocess=Preprocess(64, fit="letterbox"), **options)
