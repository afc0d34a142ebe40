"""Heatmaps of attention against their papers' equations, in slow loops over attention that timm computes unfused."""

import pytest
import timm
import torch
from torch import nn

from tests.maps import models
from visionattn.maps import (
    Chefer,
    DinoHeads,
    GradientAttention,
    GradientRollout,
    MapWarning,
    RawAttention,
    Rollout,
    ValueNorm,
)
from visionattn.maps.chain import Row
from visionattn.maps.layout import Tokens

close = torch.testing.assert_close
VITS = {
    "vit": lambda: models.vit(),
    "registers": lambda: models.vit(reg_tokens=4),
    "distilled": lambda: models.vit(name="deit_tiny_distilled_patch16_224"),
    "not square": lambda: models.vit(img_size=(32, 80)),
    "no class token": lambda: models.vit(class_token=False, global_pool="avg"),
    "registers, no class token": lambda: models.vit(class_token=False, global_pool="avg", reg_tokens=4),
}


def setting(name):
    model = VITS[name]()
    return model, models.pictures((32, 80) if name == "not square" else 64)


def start_of(model):
    """The tokens whose rows are shown: the class token, or all patches."""
    first = model.num_prefix_tokens
    return [0] if model.cls_token is not None else list(range(first, first + model.patch_embed.num_patches))


def shown(model, row):
    """The patches of a row, on the grid."""
    return row[model.num_prefix_tokens :].reshape(model.patch_embed.grid_size)


def fused(weights, fuse):
    return {"mean": weights.mean(0), "max": weights.amax(0), "min": weights.amin(0)}[fuse]


def heads_of(model, images):
    """Attention (heads, N, N) of every block, image by image, in float64."""
    with torch.no_grad():
        seen, _ = models.unfused(model, images)
    return [[layer[b].double() for layer in seen] for b in range(len(images))]


def best_class(output):
    return output.amax(1)


def assert_same_map(maps, expected):
    expected = torch.stack(expected)
    scale = float(expected.abs().max())
    assert scale > 0
    close(maps.raw.double() / scale, expected.double() / scale, atol=1e-5, rtol=0)
    low = expected.amin((1, 2), keepdim=True)
    span = expected.amax((1, 2), keepdim=True) - low
    close(maps.heatmaps.double(), ((expected - low) / span).double(), atol=1e-4, rtol=0)


# Raw ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("fuse", ["mean", "max", "min"])
def test_raw_is_the_row_of_the_class_token_or_the_mean_of_the_patches(name, fuse):
    model, images = setting(name)
    expected = []
    for layers in heads_of(model, images):
        rows = layers[-1][:, start_of(model)].mean(1)  # of each head
        expected.append(shown(model, fused(rows, fuse)))
    maps = RawAttention(fuse=fuse)(model, images)
    assert_same_map(maps, expected)
    assert maps.source == "attention of blocks.2.attn"
    assert maps.target is None


@pytest.mark.parametrize("layer", [0, 1, -2, "blocks.1.attn", "blocks.1"])
def test_raw_shows_the_layer_asked_for(layer):
    model, images = setting("vit")
    place = {0: 0}.get(layer, 1)
    maps = RawAttention(layer)(model, images)
    assert_same_map(maps, [shown(model, layers[place][:, 0].mean(0)) for layers in heads_of(model, images)])
    assert maps.source == f"attention of blocks.{place}.attn"


@pytest.mark.parametrize("head", [0, 2])
@pytest.mark.parametrize("name", ["vit", "registers", "not square"])
def test_raw_shows_one_head_of_one_patch(name, head):
    model, images = setting(name)
    columns = model.patch_embed.grid_size[1]
    query = model.num_prefix_tokens + 1 * columns + 2
    maps = RawAttention(head=head, query=(1, 2))(model, images)
    assert_same_map(maps, [shown(model, layers[-1][head, query]) for layers in heads_of(model, images)])


def test_raw_shows_a_patch_of_a_shifted_window_inside_its_window_alone():
    model, images = models.swin(), models.pictures(32)
    maps = RawAttention(1, query=(3, 3))(model, images)
    window = [(i, j) for i in range(2, 6) for j in range(2, 6)]
    inside = torch.zeros(8, 8, dtype=torch.bool)
    inside[tuple(zip(*window, strict=True))] = True
    assert bool((maps.raw[:, inside] > 0).all())
    assert bool((maps.raw[:, ~inside] == 0).all())
    close(maps.raw.sum((1, 2)), torch.ones(2))


# Rollout -----------------------------------------------------------------------------------------------------------


def drop_smallest(row, ratio, first):
    patches = sorted(range(first, len(row)), key=lambda i: float(row[i]))
    row = row.clone()
    for i in patches[: int(ratio * len(patches))]:
        row[i] = 0
    return row / row.sum()


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(("fuse", "ratio"), [("mean", 0.0), ("max", 0.0), ("min", 0.0), ("mean", 0.5), ("max", 0.9)])
def test_rollout_is_the_product_of_all_layers(name, fuse, ratio):
    model, images = setting(name)
    expected = []
    for layers in heads_of(model, images):
        product = torch.eye(len(layers[0][0]), dtype=torch.float64)
        for heads in layers:
            attention = fused(heads, fuse)
            attention = torch.stack([drop_smallest(row, ratio, model.num_prefix_tokens) for row in attention])
            product = (attention + torch.eye(len(attention))) / 2 @ product
        expected.append(shown(model, product[start_of(model)].mean(0)))
    assert_same_map(Rollout(fuse=fuse, discard=ratio)(model, images), expected)


def test_rollout_conserves_mass():
    model, images = setting("no class token")
    close(Rollout()(model, images).raw.sum((1, 2)), torch.ones(2))
    swin, images = models.swin(), models.pictures(32)
    with pytest.warns(MapWarning):
        close(Rollout()(swin, images).raw.sum((1, 2)), torch.ones(2))


def on_the_image(windows, weights):
    """(cells, cells) of one image from weights (W, n, n) of its windows."""
    count = sum(len(cells) for cells in windows)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    for cells, part in zip(windows, weights, strict=True):
        for i, query in enumerate(cells):
            for j, key in enumerate(cells):
                matrix[query, key] = part[i, j]
    return matrix


def swin_matrices(model, images):
    """Attention (8·8, 8·8) of a plain and a shifted block of windows, with gradients: [image][block] = (A, dA)."""
    seen = []
    for block in model.layers[0].blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    gradients = torch.autograd.grad(model(images).amax(1).sum(), seen)
    result = []
    for b in range(len(images)):
        layers = []
        for weights, gradient, shift in zip(seen, gradients, (0, 2), strict=True):
            windows = models.cells_of_windows(8, 4, shift)
            layers.append(
                [
                    torch.stack(
                        [
                            on_the_image(windows, part.detach().double().unflatten(0, (-1, 4))[b][:, head])
                            for head in range(part.shape[1])
                        ]
                    )
                    for part in (weights, gradient)
                ]
            )
        result.append(layers)
    return result


def fresh_swin(fused):
    model = models.swin(depths=(2,), num_heads=(2,))
    for block in model.layers[0].blocks:
        block.attn.fused_attn = fused
    return model


@pytest.mark.parametrize("fused_attn", [True, False])
def test_chains_pass_shifted_windows_as_products_of_matrices_over_the_image(fused_attn):
    images = models.pictures(32)
    rollout, chefer, weighted = [], [], []
    for layers in swin_matrices(fresh_swin(True), images):
        identity = torch.eye(64, dtype=torch.float64)
        r, c, g = identity, identity, identity
        for weights, gradient in layers:
            r = (weights.mean(0) + identity) / 2 @ r
            relevance = (weights * gradient).relu().mean(0)
            c = c + relevance @ c
            g = (relevance + identity) / (1 + relevance.sum(1, keepdim=True)) @ g
        rollout.append(r.mean(0).reshape(8, 8))
        chefer.append((c.mean(0) - 1 / 64).reshape(8, 8))
        weighted.append(g.mean(0).reshape(8, 8))
    for method, expected in ((Rollout(), rollout), (Chefer(), chefer), (GradientRollout(), weighted)):
        with pytest.warns(MapWarning, match="some attend inside windows"):
            assert_same_map(method(fresh_swin(fused_attn), images), expected)


def test_a_cell_that_several_windows_hold_is_shared_among_them():
    row = Row(torch.zeros(1, 1), torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0)))
    overlapping = Tokens((2, 3), torch.tensor([[0, 1, 3, 4], [1, 2, 4, 5]]))
    values = row.read(overlapping, 4)
    cells = row.grid_Bhw.flatten()
    close(values[0, 0], torch.stack([cells[0], cells[1] / 2, cells[3], cells[4] / 2]))
    close(values.sum(), cells.sum())


@pytest.mark.parametrize("method", [Rollout(), GradientRollout(), Chefer()], ids=lambda m: m.name)
def test_chains_warn_where_patches_are_merged(method):
    model = models.stirred(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)))
    with pytest.warns(MapWarning, match="patches are merged or pooled"):
        method(model, models.pictures(64))


# With gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("fused_attn", [True, False])
def test_gradient_times_attention_is_its_equation(name, fused_attn):
    model, images = setting(name)
    layers = models.with_gradients(model, images, best_class)
    set_fused(model, fused_attn)
    for layer in (-1, 0):
        weights, gradient = layers[layer]
        expected = [
            shown(model, sum((w * g).clamp(min=0)[start_of(model)].mean(0) for w, g in zip(ws, gs, strict=True)) / 3)
            for ws, gs in zip(weights, gradient, strict=True)
        ]
        maps = GradientAttention(layer)(model, images)
        assert_same_map(maps, expected)
        assert torch.equal(maps.target, model(images).argmax(1))


def set_fused(model, value):
    for block in model.blocks:
        block.attn.fused_attn = value


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize("fused_attn", [True, False])
def test_chefer_is_its_equation(name, fused_attn):
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
def test_gradient_rollout_is_its_equation(name):
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


def test_gradients_reach_attention_inside_multihead_attention():
    model, images = models.torchvision_vit(), models.pictures()
    relevance = torch.eye(17, dtype=torch.float64).expand(2, 17, 17)
    for weights, gradient in torchvision_with_gradients(model, images):
        relevance = relevance + (weights * gradient).clamp(min=0).mean(1) @ relevance
    assert_same_map(Chefer()(model, images), list(relevance[:, 0, 1:].reshape(2, 4, 4)))


def torchvision_with_gradients(model, images):
    """Run the encoder by hand with attention as plain matrices."""
    seen, x = [], model._process_input(images)
    x = torch.cat([model.class_token.expand(len(x), -1, -1), x], 1) + model.encoder.pos_embedding
    for layer in model.encoder.layers:
        attention, normed = layer.self_attention, layer.ln_1(x)
        qkv = nn.functional.linear(normed, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = qkv.unflatten(2, (3, 3, 16)).permute(2, 0, 3, 1, 4)
        weights = torch.softmax(query @ key.mT / 4, -1)
        seen.append(weights)
        x = x + attention.out_proj((weights @ value).transpose(1, 2).flatten(2))
        x = x + layer.mlp(layer.ln_2(x))
    output = model.heads(model.encoder.ln(x)[:, 0])
    close(output, model(images), atol=1e-4, rtol=1e-4)
    gradients = torch.autograd.grad(output.amax(1).sum(), seen)
    return [(w.detach().double(), g.double()) for w, g in zip(seen, gradients, strict=True)]


# Values and DINO ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VITS)
def test_value_norm_is_attention_times_the_length_of_the_values(name):
    model, images = setting(name)
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
                row[j] += layers[-1][h, start_of(model), j].mean() * values[b, j, h].square().sum().sqrt() / 3
        expected.append(shown(model, row))
    assert_same_map(ValueNorm()(model, images), expected)


@pytest.mark.parametrize("name", ["vit", "registers", "distilled"])
@pytest.mark.parametrize("mass", [0.6, 0.2, 1.0])
def test_dino_keeps_each_heads_largest_weights_up_to_the_mass(name, mass):
    model, images = setting(name)
    expected = []
    for layers in heads_of(model, images):
        total = torch.zeros(16, dtype=torch.float64)
        for head in layers[-1][:, 0, model.num_prefix_tokens :]:
            budget = mass * float(head.sum())
            for place in sorted(range(16), key=lambda i: -float(head[i])):
                if budget <= 1e-9:
                    break
                total[place] += head[place] / 3
                budget -= float(head[place])
        expected.append(total.reshape(4, 4))
    assert_same_map(DinoHeads(mass=mass)(model, images), expected)


# Registers ---------------------------------------------------------------------------------------------------------


def test_a_register_that_draws_most_attention_is_not_in_the_map():
    model, images = setting("registers")
    with torch.no_grad():
        model.reg_token[:, 1] = model.cls_token[:, 0] * 3
    for b, layers in enumerate(heads_of(model, images)):
        row = layers[-1][:, 0].mean(0)
        maps = RawAttention()(model, images)
        assert maps.raw.shape == (2, 4, 4)
        close(float(maps.raw[b].sum()), 1 - float(row[:5].sum()), atol=1e-5, rtol=0)
        assert float(maps.heatmaps[b].amax()) == 1
