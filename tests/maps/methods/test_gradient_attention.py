"""Attention times its gradient matches the equation."""

import pytest
import torch
from torch import nn

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
from visionattn.maps import Chefer, GradientAttention

close = torch.testing.assert_close


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("fused_attn", [True, False])
def test_gradient_times_attention_matches_its_equation(name, fused_attn):
    model, images = model_and_images(name)
    layers = models.with_gradients(model, images, best_class)
    set_fused(model, fused_attn)
    for layer in (-1, 0):
        weights, gradient = layers[layer]
        expected = [
            patches_on_grid(
                model, sum((w * g).clamp(min=0)[query_tokens(model)].mean(0) for w, g in zip(ws, gs, strict=True)) / 3
            )
            for ws, gs in zip(weights, gradient, strict=True)
        ]
        maps = GradientAttention(layer)(model, images)
        assert_same_map(maps, expected)
        assert torch.equal(maps.target, model(images).argmax(1))


def test_gradients_reach_attention_inside_multihead_attention():
    model, images = models.torchvision_vit(), models.pictures()
    relevance = torch.eye(17, dtype=torch.float64).expand(2, 17, 17)
    for weights, gradient in torchvision_with_gradients(model, images):
        relevance = relevance + (weights * gradient).clamp(min=0).mean(1) @ relevance
    assert_same_map(Chefer()(model, images), list(relevance[:, 0, 1:].reshape(2, 4, 4)))


def torchvision_with_gradients(model, images):
    """Return (A, ∂y/∂A) of every layer, from the encoder by hand with the attention weights as matrices."""
    weights_of_layers, x = [], model._process_input(images)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1) + model.encoder.pos_embedding
    for layer in model.encoder.layers:
        attention, normed = layer.self_attention, layer.ln_1(x)
        qkv = nn.functional.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = qkv.unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.mT / 4, -1)
        weights_of_layers.append(weights)
        x = x + attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.ln_2(x))
    output = model.heads(model.encoder.ln(x)[:, 0])
    close(output, model(images), atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(output.amax(1).sum(), weights_of_layers)
    return [(w.detach().double(), g.double()) for w, g in zip(weights_of_layers, gradients, strict=True)]
