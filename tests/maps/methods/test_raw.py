"""Raw attention, value norms and DINO's heads match slow loops over attention that timm computes unfused."""

import copy

import pytest
import timm
import torch

from tests.capture import models
from tests.maps.methods.vits import (
    VITS,
    assert_same_map,
    fused,
    heads_of,
    model_and_images,
    patches_on_grid,
    query_tokens,
)
from visionattn.maps import DinoHeads, RawAttention, ValueNorm

close = torch.testing.assert_close


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
def test_raw_is_the_row_of_the_class_token_or_the_mean_of_the_patches(name, fuse):
    model, images = model_and_images(name)
    expected = []
    for layers in heads_of(model, images):
        rows = layers[-1][:, query_tokens(model)].mean(1)  # one row per head
        expected.append(patches_on_grid(model, fused(rows, fuse)))
    maps = RawAttention(fuse=fuse)(model, images)
    assert_same_map(maps, expected)
    assert maps.source == "attention of blocks.2.attn"
    assert maps.target is None


@pytest.mark.parametrize("layer", [0, 1, -2, "blocks.1.attn", "blocks.1"])
def test_raw_shows_the_chosen_layer(layer):
    model, images = model_and_images("vit")
    index = {0: 0}.get(layer, 1)
    maps = RawAttention(layer)(model, images)
    assert_same_map(maps, [patches_on_grid(model, layers[index][:, 0].mean(0)) for layers in heads_of(model, images)])
    assert maps.source == f"attention of blocks.{index}.attn"


@pytest.mark.parametrize("head", [0, 2])
@pytest.mark.parametrize("name", ["vit", "registers", "not square"])
def test_raw_shows_the_row_of_one_patch_in_one_head(name, head):
    model, images = model_and_images(name)
    columns = model.patch_embed.grid_size[1]
    query = model.num_prefix_tokens + 1 * columns + 2
    maps = RawAttention(head=head, query=(1, 2))(model, images)
    assert_same_map(maps, [patches_on_grid(model, layers[-1][head, query]) for layers in heads_of(model, images)])


def test_the_row_of_a_patch_is_zero_outside_its_shifted_window():
    model, images = models.swin(), models.pictures(32)
    maps = RawAttention(1, query=(3, 3))(model, images)
    window = [(i, j) for i in range(2, 6) for j in range(2, 6)]
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[tuple(zip(*window, strict=True))] = True
    assert bool((maps.raw[:, inside] > 0).all())
    assert bool((maps.raw[:, ~inside] == 0).all())
    close(maps.raw.sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize("name", VITS)
def test_value_norm_is_attention_times_the_norm_of_the_values(name):
    model, images = model_and_images(name)
    qkv = []
    handle = model.blocks[-1].attn.qkv.register_forward_hook(lambda module, args, out: qkv.append(out.detach()))
    heads = heads_of(model, images)
    values = qkv[0].double().unflatten(2, (3, 3, 16))[:, :, 2]  # (B, N, heads, 16)
    handle.remove()
    expected = []
    for b, layers in enumerate(heads):
        row = torch.zeros(values.shape[1], dtype=torch.float64)
        for j in range(len(row)):
            for h in range(3):
                row[j] += layers[-1][h, query_tokens(model), j].mean() * values[b, j, h].square().sum().sqrt() / 3
        expected.append(patches_on_grid(model, row))
    assert_same_map(ValueNorm()(model, images), expected)


@pytest.mark.parametrize("name", ["vit", "registers", "distilled"])
@pytest.mark.parametrize("mass", [0.6, 0.2, 1.0])
def test_dino_keeps_each_heads_largest_weights_up_to_the_mass(name, mass):
    model, images = model_and_images(name)
    expected = []
    for layers in heads_of(model, images):
        total = torch.zeros(16, dtype=torch.float64)
        for head in layers[-1][:, 0, model.num_prefix_tokens :]:
            budget = mass * float(head.sum())
            for index in sorted(range(16), key=lambda i: -float(head[i])):
                if budget <= 1e-9:
                    break
                total[index] += head[index] / 3
                budget -= float(head[index])
        expected.append(total.reshape(4, 4))
    assert_same_map(DinoHeads(mass=mass)(model, images), expected)


def test_the_attention_to_register_tokens_is_not_in_the_map():
    model, images = model_and_images("registers")
    with torch.no_grad():
        model.reg_token[:, 1] = model.cls_token[:, 0] * 3
    for b, layers in enumerate(heads_of(model, images)):
        row = layers[-1][:, 0].mean(0)
        maps = RawAttention()(model, images)
        assert maps.raw.shape == (2, 4, 4)
        close(float(maps.raw[b].sum()), 1 - float(row[:5].sum()), atol=1e-5, rtol=0)
        assert float(maps.heatmaps[b].amax()) == 1


def naflex(**options):
    """Return a NaFlexViT of two blocks without class token, for images of 4 × 6 patches."""
    options = {"depth": 2, "embed_dim": 96, "num_heads": 2, "num_classes": 5} | options
    return models.randomised(timm.create_model("naflexvit_base_patch16_gap", **options))


def unfused_weights(model, images):
    """Return what timm's unfused path multiplies the values with, (B, H, N, N), of each block."""
    model, seen = copy.deepcopy(model), []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(args[0].detach().double()))
    model(images)
    return seen


@pytest.mark.parametrize("fused_attn", [True, False])
@pytest.mark.parametrize(("layer", "number"), [(-1, 1), (0, 0), ("blocks.0", 0)])
@pytest.mark.parametrize("head", [None, 1])
def test_differential_attention_is_shown_as_the_difference_of_its_two_maps(fused_attn, layer, number, head):
    model, images = naflex(attn_layer="diff"), models.pictures((64, 96))
    attn = model.blocks[number].attn
    factor = float(attn._compute_lambda().detach())
    weights = unfused_weights(model, images)[number].unflatten(1, (2, 2))
    expected = []
    for b in range(2):
        of_heads = [weights[b, h, 0] - factor * weights[b, h, 1] for h in ((0, 1) if head is None else (head,))]
        rows = torch.stack(of_heads).mean(0)[model.num_prefix_tokens :].mean(0)  # over the queries of all patches
        expected.append(rows[model.num_prefix_tokens :].reshape(4, 6))
    for block in model.blocks:
        block.attn.fused_attn = fused_attn
    maps = RawAttention(layer, head=head)(model, images)
    assert_same_map(maps, expected)
    assert maps.source == f"differential attention of blocks.{number}.attn"


@pytest.mark.parametrize("fused_attn", [True, False])
def test_gated_attention_is_captured_before_its_gate(fused_attn):
    model, images = naflex(attn_gated=True), models.pictures((64, 96))
    first = model.num_prefix_tokens
    (*_, weights) = unfused_weights(model, images)
    expected = [part.mean(0)[first:].mean(0)[first:].reshape(4, 6) for part in weights]
    for block in model.blocks:
        block.attn.fused_attn = fused_attn
    maps = RawAttention()(model, images)
    assert_same_map(maps, expected)
    assert maps.source == "attention of blocks.1.attn"
