"""What is kept of each call: all weights, head means, rows; of which layers, calls and image sizes."""

import pytest
import timm
import torch

from tests.maps import models
from tests.maps.models import kept
from visionattn.maps import ClassRow, Full, HeadMean, Nothing, PatchRow, capture

close = torch.testing.assert_close


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (models.vit, 64),
        (lambda: models.vit(reg_tokens=4), 64),
        (lambda: models.vit(reg_tokens=4, class_token=False, global_pool="avg"), 64),
        (models.torchvision_vit, 64),
        (models.swin, 32),
        (lambda: models.stirred(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1))), 64),
    ],
    ids=["vit", "registers", "registers without class token", "torchvision", "swin", "pooled keys"],
)
def test_what_is_kept_agrees_with_slices_of_everything(make, size):
    model, images = make(), models.pictures(size)
    full = kept(model, images, Full())
    for record, mean in zip(full, kept(model, images, HeadMean()), strict=True):
        close(mean.weights, record.weights.mean(2), atol=1e-5, rtol=0)
    for record, row in zip(full, kept(model, images, ClassRow()), strict=True):
        has_class = record.num_prefix_tokens > 0 and getattr(model, "cls_token", getattr(model, "class_token", None))
        first = record.num_prefix_tokens
        expected = (
            record.weights[:, :, :, 0] if has_class is not None and first else record.weights[..., first:, :].mean(3)
        )
        close(row.weights, expected, atol=1e-6, rtol=0)
    for record, row in zip(full, kept(model, images, PatchRow(1, 0)), strict=True):
        width = record.queries.grid[1]
        window, query = (record.queries.index_WN == width).nonzero()[0].tolist()
        expected = torch.zeros_like(row.weights)
        expected[:, window] = record.weights[:, window, :, query]
        close(row.weights, expected, atol=1e-6, rtol=0)
    assert all(record.weights is None for record in kept(model, images, Nothing()))


def test_layers_may_be_chosen_by_place_and_by_name():
    model, images = models.vit(), models.pictures()
    full = kept(model, images, Full())
    some = kept(model, images, Full(), layers=[-1, "blocks.0"])
    assert [record.weights is None for record in some] == [False, True, False]
    close(some[0].weights, full[0].weights)
    close(some[2].weights, full[2].weights)


def test_several_calls_add_up_and_are_told_apart():
    model, images = models.vit(depth=2), models.pictures()
    with torch.no_grad(), capture(model, Full()) as records:
        model(images)
        model(images[:1])
    assert [record.call for record in records] == [0, 0, 1, 1]
    close(records[0].weights[:1], records[2].weights, atol=1e-6, rtol=0)
    assert records["blocks.1.attn"] is records[3]
    assert records.report().startswith("4 seen in 2 calls")


def test_another_image_size_is_surveyed_anew():
    model = models.vit(dynamic_img_size=True)
    with torch.no_grad(), capture(model, Full()) as records:
        model(models.pictures(64))
        model(models.pictures((32, 96)))
    assert [record.grid for record in records] == [(4, 4)] * 3 + [(2, 6)] * 3
