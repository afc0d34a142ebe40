"""Rollout and the other methods through all layers match products of matrices over all cells of the image."""

import warnings

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
from visionattn.capture.token_layout import Tokens
from visionattn.errors import MapWarning
from visionattn.maps import Chefer, GradientRollout, Rollout
from visionattn.maps.methods.rollout import Row

close = torch.testing.assert_close


def drop_smallest(row, ratio, first):
    patches = sorted(range(first, len(row)), key=lambda i: float(row[i]))
    row = row.clone()
    for i in patches[: int(ratio * len(patches))]:
        row[i] = 0
    return row / row.sum()


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(("fuse", "ratio"), [("mean", 0.0), ("max", 0.0), ("min", 0.0), ("mean", 0.5), ("max", 0.9)])
def test_rollout_is_the_product_of_all_layers(name, fuse, ratio):
    model, images = model_and_images(name)
    expected = []
    for layers in heads_of(model, images):
        product = torch.eye(len(layers[0][0]), dtype=torch.float64)
        for heads in layers:
            attention = fused(heads, fuse)
            attention = torch.stack([drop_smallest(row, ratio, model.num_prefix_tokens) for row in attention])
            product = (attention + torch.eye(len(attention))) / 2 @ product
        expected.append(patches_on_grid(model, product[query_tokens(model)].mean(0)))
    assert_same_map(Rollout(fuse=fuse, discard=ratio)(model, images), expected)


def test_the_values_of_a_rollout_sum_to_one():
    model, images = model_and_images("no class token")
    close(Rollout()(model, images).raw.sum((1, 2)), torch.ones(2))
    swin, images = models.swin(), models.pictures(32)
    with pytest.warns(MapWarning):
        close(Rollout()(swin, images).raw.sum((1, 2)), torch.ones(2))


def matrix_over_cells(windows, weights):
    """Return a matrix (cells, cells) of one image from the weights (W, n, n) of its windows."""
    count = sum(len(cells) for cells in windows)
    matrix = torch.zeros(count, count, dtype=torch.float64)
    for cells, part in zip(windows, weights, strict=True):
        for i, query in enumerate(cells):
            for j, key in enumerate(cells):
                matrix[query, key] = part[i, j]
    return matrix


def swin_matrices(model, images):
    """Return [image][block]: (A, dA), each (heads, 64, 64), of a block with plain windows and one with shifted ones."""
    attention = []
    for block in model.layers[0].blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, args, out: attention.append(args[0]))
    gradients = torch.autograd.grad(model(images).amax(1).sum(), attention)
    result = []
    for b in range(len(images)):
        layers = []
        for weights, gradient, shift in zip(attention, gradients, (0, 2), strict=True):
            windows = models.cells_of_windows(8, 4, shift)
            layers.append(
                [
                    torch.stack(
                        [
                            matrix_over_cells(windows, part.detach().double().unflatten(0, (-1, 4))[b][:, head])
                            for head in range(part.shape[1])
                        ]
                    )
                    for part in (weights, gradient)
                ]
            )
        result.append(layers)
    return result


def two_block_swin(fused):
    model = models.swin(depths=(2,), num_heads=(2,))
    for block in model.layers[0].blocks:
        block.attn.fused_attn = fused
    return model


@pytest.mark.parametrize("fused_attn", [True, False])
def test_methods_through_shifted_windows_match_products_of_matrices_over_cells(fused_attn):
    images = models.pictures(32)
    rollout, chefer, weighted = [], [], []
    for layers in swin_matrices(two_block_swin(True), images):
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
        with pytest.warns(MapWarning, match="some layers attend inside windows"):
            assert_same_map(method(two_block_swin(fused_attn), images), expected)


def test_the_relevance_of_a_cell_in_several_windows_is_divided_among_them():
    row = Row(torch.zeros(1, 1), torch.rand(1, 2, 3, generator=torch.Generator().manual_seed(0)))
    overlapping = Tokens((2, 3), torch.tensor([[0, 1, 3, 4], [1, 2, 4, 5]]))
    values = row.read(overlapping, 4)
    cells = row.grid_Bhw.flatten()
    close(values[0, 0], torch.stack([cells[0], cells[1] / 2, cells[3], cells[4] / 2]))
    close(values.sum(), cells.sum())


@pytest.mark.parametrize("method", [Rollout(), GradientRollout(), Chefer()], ids=lambda m: m.name)
def test_methods_through_all_layers_warn_if_patches_are_merged(method):
    model = models.randomised(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1)))
    with pytest.warns(MapWarning, match="this model merges or pools patches"):
        method(model, models.pictures(64))


@pytest.mark.parametrize("method", [Rollout, Chefer, GradientRollout])
def test_layers_that_are_not_understood_are_named(method):
    model = timm.create_model("nextvit_small").eval()
    message = rf"{method.name} uses 1 of 4 layers .* leaves out stages\.1\.blocks\.3\.e_mhsa"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the map of the last layer's 2 × 2 tokens may be constant
        with pytest.warns(MapWarning, match=message):
            found = method()(model, torch.rand(1, 3, 64, 64))
    assert found.source == "1 of 4 layers of attention"
