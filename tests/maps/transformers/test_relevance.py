"""Chefer's relevance and gradient rollout against their papers' equations."""

import pytest
import torch

from tests.capture import models
from tests.maps.transformers.vits import VITS, assert_same_map, best_class, set_fused, setting, shown, start_of
from visionattn.maps import Chefer, GradientRollout


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("fused_attn", [True, False])
def test_chefer_matches_its_equation(name, fused_attn):
    model, images = setting(name)
    layers = models.with_gradients(model, images, best_class)
    set_fused(model, fused_attn)
    expected = []
    for b in range(len(images)):
        relevance = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
        for weights, gradient in layers:
            relevance = relevance + (weights[b] * gradient[b]).clamp(min=0).mean(0) @ relevance
        rows = relevance[start_of(model)].mean(0)
        expected.append(shown(model, rows) - (0 if model.cls_token is not None else 1 / len(start_of(model))))
    assert_same_map(Chefer()(model, images), expected)


@pytest.mark.parametrize("name", VITS)
def test_gradient_rollout_matches_its_equation(name):
    model, images = setting(name)
    layers = models.with_gradients(model, images, best_class)
    expected = []
    for b in range(len(images)):
        product = identity = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
        for weights, gradient in layers:
            weighted = (weights[b] * gradient[b]).clamp(min=0).mean(0) + identity
            product = weighted / weighted.sum(1, keepdim=True) @ product
        expected.append(shown(model, product[start_of(model)].mean(0)))
    assert_same_map(GradientRollout()(model, images), expected)
