"""Heatmaps of a model on a GPU equal those on the CPU."""

import numpy as np
import pytest
import torch

from tests.capture import models
from visionattn.data import Preprocess
from visionattn.overlays import heatmap

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(
    ("build", "method"),
    [(models.vit, "rollout"), (models.vit, "chefer"), (models.vit, "raw"), (models.resnet, "gradcam")],
)
def test_heatmap_on_a_gpu_equals_that_on_the_cpu(build, method, gpu):
    model, picture = build(), np.random.default_rng(0).integers(0, 256, (80, 96, 3), dtype=np.uint8)
    options = {"method": method, "preprocess": Preprocess(64), "target": 1}
    expected = heatmap(model, picture, **options).values
    found = heatmap(model.to(gpu), picture, **options).values
    assert np.abs(found - expected).max() < 5e-3
    with torch.autocast(gpu.type, torch.bfloat16):
        in_bf16 = heatmap(model, picture, **options).values
    assert np.corrcoef(in_bf16.ravel(), expected.ravel())[0, 1] > 0.98
