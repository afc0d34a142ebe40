"""Chefer's relevance and gradient rollout match the equations of their papers."""

import pytest
import timm
import torch

from tests.capture import models
from tests.maps.methods.vits import (
    VITS,
    assert_same_map,
    best_class,
    model_and_images,
    patches_on_grid,
    query_tokens,
    set_fused,
)
from visionattn.maps import Chefer, GradientRollout


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("fused_attn", [True, False])
def test_chefer_matches_its_equation(name, fused_attn):
    model, images = model_and_images(name)
    layers = models.with_gradients(model, images, best_class)
    set_fused(model, fused_attn)
    expected = []
    for b in range(len(images)):
        relevance = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
        for weights, gradient in layers:
            relevance = relevance + (weights[b] * gradient[b]).clamp(min=0).mean(0) @ relevance
        rows = relevance[query_tokens(model)].mean(0)
        expected.append(
            patches_on_grid(model, rows) - (0 if model.cls_token is not None else 1 / len(query_tokens(model)))
        )
    assert_same_map(Chefer()(model, images), expected)


@pytest.mark.parametrize("name", VITS)
def test_gradient_rollout_matches_its_equation(name):
    model, images = model_and_images(name)
    layers = models.with_gradients(model, images, best_class)
    expected = []
    for b in range(len(images)):
        product = identity = torch.eye(layers[0][0].shape[-1], dtype=torch.float64)
        for weights, gradient in layers:
            weighted = (weights[b] * gradient[b]).clamp(min=0).mean(0) + identity
            product = weighted / weighted.sum(1, keepdim=True) @ product
        expected.append(patches_on_grid(model, product[query_tokens(model)].mean(0)))
    assert_same_map(GradientRollout()(model, images), expected)


@pytest.mark.filterwarnings("ignore::visionattn.errors.MapWarning")  # the maps of parallel branches are approximate
@pytest.mark.parametrize("method", [Chefer, GradientRollout])
@pytest.mark.parametrize(
    ("name", "options"),
    [("crossvit_9_240", {}), ("naflexvit_base_patch16_gap", {"attn_layer": "diff", "depth": 2, "embed_dim": 96})],
)
def test_attention_that_does_not_depend_on_the_first_layer_has_a_gradient_of_its_own(method, name, options):
    model = models.randomised(timm.create_model(name, **options))
    size = model.pretrained_cfg["input_size"][-1]
    found = method()(model, models.pictures(size, batch=1))
    assert found.raw.abs().sum() > 0
