"""A model, images and a comparison for tests of exported graphs."""

import warnings

import numpy as np
import timm
import torch

import visionattn as va
from visionattn.attention import CBAM
from visionattn.errors import MapWarning
from visionattn.maps import METHODS


def resnet_with_cbam():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    va.insert(model, CBAM, at="stages", preserve=False)
    # features and weights are ≥ 0, so the Grad-CAM map of every class has positive values
    model.fc.weight.data.uniform_(0, 0.2)
    return model.eval()


def images(count, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def assert_graph_equals_model(outputs, model, method, batch):
    """Compare a graph's outputs (scores, heatmaps) with those of the method."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # windows, and constant maps of random weights, cause warnings
        maps = METHODS[method]()(model, batch)
    scores, heatmap = (torch.as_tensor(np.asarray(output)) for output in outputs)
    torch.testing.assert_close(scores, maps.output, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(heatmap, maps.heatmaps, atol=1e-4, rtol=0)
    assert len(batch) < 5 or heatmap.amax() == 1
