"""TokenRank is the left eigenvector of the attention between patches, read as a Markov chain."""

import numpy as np
import pytest
import timm
import torch

from tests.capture import models
from tests.maps.methods.vits import VITS, assert_same_map, heads_of, model_and_images, set_fused
from visionattn.errors import UsageError
from visionattn.maps import TokenRank


def slow_token_rank(weights, first, alpha):
    """Return the stationary distribution by the eigenvectors of the chain, built entry by entry."""
    count = len(weights) - first
    chain = np.zeros((count, count))
    for i in range(count):
        total = sum(float(weights[first + i, first + k]) for k in range(count))
        for j in range(count):
            chain[i, j] = alpha * float(weights[first + i, first + j]) / total + (1 - alpha) / count
    values, vectors = np.linalg.eig(chain.T)
    vector = vectors[:, np.abs(values - 1).argmin()].real
    return torch.from_numpy(vector / vector.sum())


@pytest.mark.parametrize("name", VITS)
@pytest.mark.parametrize(("layer", "head", "alpha"), [(-1, None, 0.99), (0, 1, 0.5)])
@pytest.mark.parametrize("fused_attn", [True, False])
def test_token_rank_matches_its_equation(name, layer, head, alpha, fused_attn):
    model, images = model_and_images(name)
    expected = []
    for layers in heads_of(model, images):
        weights = layers[layer].mean(0) if head is None else layers[layer][head]
        rank = slow_token_rank(weights, model.num_prefix_tokens, alpha)
        expected.append(rank.reshape(model.patch_embed.grid_size))
    set_fused(model, fused_attn)
    assert_same_map(TokenRank(layer, head=head, alpha=alpha)(model, images), expected)


def test_token_rank_is_exact_if_almost_every_patch_attends_to_itself():
    model, images = model_and_images("vit")
    with torch.no_grad():
        weight = model.blocks[-1].attn.qkv.weight
        weight[:96] *= 4
        weight[48:96] = weight[:48]  # keys equal queries
    weights = [layers[-1].mean(0) for layers in heads_of(model, images)]
    assert min(float(w.diagonal()[1:].median()) for w in weights) > 0.999
    expected = [slow_token_rank(w, 1, 0.9999).reshape(4, 4) for w in weights]
    assert_same_map(TokenRank(alpha=0.9999)(model, images), expected)


def test_the_ranks_sum_to_one():
    model, images = model_and_images("registers")
    torch.testing.assert_close(TokenRank()(model, images).raw.sum((1, 2)), torch.ones(2))


@pytest.mark.parametrize(
    ("make", "size"), [(models.swin, 32), (lambda: timm.create_model("cait_xxs24_224", img_size=64, depth=1), 64)]
)
def test_layers_in_which_not_all_patches_attend_to_each_other_are_refused(make, size):
    layer = 0 if size == 32 else -1
    with pytest.raises(UsageError, match="token_rank needs a layer in which every patch attends to every patch, and "):
        TokenRank(layer)(make().eval(), models.pictures(size))


def test_arguments_out_of_range_are_refused():
    with pytest.raises(UsageError, match="alpha must be between 0 and 1, got 1"):
        TokenRank(alpha=1)
    with pytest.raises(UsageError, match=r"blocks\.2\.attn has no head 3; its heads are 0 to 2"):
        TokenRank(head=3)(models.vit(), models.pictures(64))
