"""Scores of one method and one control on 40 images, without a model."""

import numpy as np

from visionattn.evaluation import Scores

SCORES = Scores(
    {"raw": {"deletion": np.linspace(0, 1, 40, dtype=np.float32)}, "centre": {"deletion": np.ones(40, np.float32)}},
    controls={"raw": ("centre",)},
    failed={},
    accuracy=None,
    paths=tuple(f"{index}.png" for index in range(40)),
    seed=0,
)
