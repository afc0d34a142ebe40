"""Small ViTs, and their attention from timm's unfused path, for the tests of methods."""

import torch

from tests.capture import models

close = torch.testing.assert_close
VITS = {
    "vit": lambda: models.vit(),
    "registers": lambda: models.vit(reg_tokens=4),
    "distilled": lambda: models.vit(name="deit_tiny_distilled_patch16_224"),
    "not square": lambda: models.vit(img_size=(32, 80)),
    "no class token": lambda: models.vit(class_token=False, global_pool="avg"),
    "registers, no class token": lambda: models.vit(class_token=False, global_pool="avg", reg_tokens=4),
}


def model_and_images(name):
    model = VITS[name]()
    return model, models.pictures((32, 80) if name == "not square" else 64)


def query_tokens(model):
    """Return the indices of the tokens whose attention a map shows: the class token, or all patches."""
    first = model.num_prefix_tokens
    return [0] if model.cls_token is not None else list(range(first, first + model.patch_embed.num_patches))


def patches_on_grid(model, row):
    """Return the values of the patches among values of all tokens, (rows, columns)."""
    return row[model.num_prefix_tokens :].reshape(model.patch_embed.grid_size)


def fused(weights, fuse):
    return {"mean": weights.mean(0), "max": weights.amax(0), "min": weights.amin(0)}[fuse]


def heads_of(model, images):
    """Return attention (heads, N, N) of every block, image by image, in float64."""
    with torch.no_grad():
        layers, _ = models.unfused(model, images)
    return [[layer[b].double() for layer in layers] for b in range(len(images))]


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


def set_fused(model, value):
    for block in model.blocks:
        block.attn.fused_attn = value
