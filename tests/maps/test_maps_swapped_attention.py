"""Sparse self-attention has the same records and heatmaps as dense attention with the same mask."""

import copy

import pytest
import torch

from tests.attention.self_attention.attended_by_hand import MASKED, weights_by_hand
from tests.capture import models
from visionattn.attention import PooledKeys, SelfAttention, swap_attention
from visionattn.capture import FullAttention, capture
from visionattn.maps import Chefer, GradientAttention, RawAttention, Rollout

close = torch.testing.assert_close
SIZE, GRID, PREFIX = (64, 96), (4, 6), 2
OPTIONS = {"img_size": SIZE, "depth": 2, "reg_tokens": PREFIX - 1}
masked = pytest.mark.parametrize(("make", "m"), MASKED.values(), ids=MASKED)


class Eager(SelfAttention):
    """Dense attention with its own softmax, and with the mask and bias of a sparse form from `weights_by_hand`."""

    def __init__(self, num_heads, m):
        super().__init__(num_heads)
        self.bias = weights_by_hand(m, num_heads, GRID, PREFIX).log().float()
        self.weights = None

    def attend(self, q, k, v, grid, prefix, p):
        self.weights = (q @ k.mT * q.shape[-1] ** -0.5 + self.bias).softmax(-1)
        return self.weights @ v


def pair(make, m):
    """Return a ViT with a sparse form, the same ViT with dense attention and the form's mask, and its mechanisms."""
    sparse = models.vit(**OPTIONS)
    dense = copy.deepcopy(sparse)
    swap_attention(sparse, make)
    swap = swap_attention(dense, lambda heads: Eager(heads, m))
    return sparse, dense, [part.mechanism for part in swap.places.values()]


@masked
def test_rows_equal_those_of_dense_attention_with_the_mask(make, m):
    sparse, dense, eager = pair(make, m)
    images = models.pictures(SIZE)
    with torch.no_grad():
        unwatched = sparse(images)
        dense(images)
    records = models.kept(sparse, images, FullAttention())
    assert [record.name for record in records] == [f"blocks.{block}.attn.mechanism" for block in range(2)]
    for record, part in zip(records, eager, strict=True):
        assert (record.kind, record.grid, record.num_prefix_tokens, record.heads) == ("self", GRID, PREFIX, 3)
        assert not record.windowed
        close(record.weights[:, 0], part.weights, atol=1e-5, rtol=0)
    with torch.no_grad():
        with capture(sparse):
            close(sparse(images), unwatched, atol=1e-5, rtol=1e-4)
        close(sparse(images), unwatched, atol=0, rtol=0)  # the sparse form is restored


@masked
@pytest.mark.parametrize(
    "method", [RawAttention(), Rollout(), GradientAttention(), Chefer()], ids=lambda method: method.name
)
def test_maps_equal_those_of_dense_attention_with_the_mask(make, m, method):
    sparse, dense, _ = pair(make, m)
    images = models.pictures(SIZE)
    found, expected = (method(model, images, target=3) for model in (sparse, dense))
    close(found.raw, expected.raw, atol=1e-5, rtol=1e-3)
    assert tuple(found.heatmaps.shape) == (2, *GRID)


def test_pooled_keys_and_their_maps_have_the_pooled_grid():
    model, images = models.vit(**OPTIONS), models.pictures(SIZE)
    swap_attention(model, lambda heads: PooledKeys(heads, pool=2))
    (record, _) = models.kept(model, images, FullAttention())
    assert (record.grid, record.queries.grid, record.num_prefix_tokens) == ((2, 3), GRID, PREFIX)
    close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]))
    maps = RawAttention(0)(model, images)
    last = record.weights[:, 0, :, 0, PREFIX:].mean(1).reshape(2, 2, 3)
    close(maps.raw, last, atol=1e-6, rtol=0)
