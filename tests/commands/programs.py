"""Models for exported graphs, and images for them."""

import warnings

import numpy as np
import timm
import torch

import visionattn as va
from visionattn.attention import CBAM
from visionattn.errors import MapWarning
from visionattn.maps import METHODS


def gated():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    va.insert(model, CBAM, at="stages", preserve=False)
    model.fc.weight.data.uniform_(0, 0.2)  # features are ≥ 0: every class's map is above 0 somewhere
    return model.eval()


def images(count, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def close(found, model, method, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # about windows, and constant maps of random weights
        maps = METHODS[method]()(model, batch)
    scores, heatmap = (torch.as_tensor(np.asarray(part)) for part in found)
    torch.testing.assert_close(scores, maps.output, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(heatmap, maps.heatmaps, atol=1e-4, rtol=0)
    assert len(batch) < 5 or heatmap.amax() == 1
