"""The recorded weights of a fused call are the softmax of its queries and keys, for all arguments of the call."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import models
from tests.capture.models import softmax_by_hand
from visionattn.capture import FullAttention, HeadMean, capture
from visionattn.maps import Rollout

close = torch.testing.assert_close


def by_hand_from_qkv(model, images):
    """Return the weights of every block of a timm ViT from the output of its qkv layer."""
    weights = []
    heads = model.blocks[0].attn.num_heads

    def append_weights(module, args, out):
        batch, tokens, _ = out.shape
        query, key, _ = out.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        weights.append(softmax_by_hand(query, key))

    handles = [block.attn.qkv.register_forward_hook(append_weights) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return weights


def test_weights_of_a_fused_vit_are_softmax_of_queries_and_keys():
    model, images = models.vit(depth=2), models.pictures()
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(images)
    assert [record.name for record in records] == ["blocks.0.attn", "blocks.1.attn"]
    for record, expected in zip(records, by_hand_from_qkv(model, images), strict=True):
        close(record.weights[:, 0].double(), expected, atol=1e-5, rtol=0)
        close(record.weights.sum(-1), torch.ones(2, 1, 3, 17))
        assert (record.kind, record.grid, record.num_prefix_tokens, record.heads) == ("self", (4, 4), 1, 3)
        assert record.keys.index_WN.tolist() == [[-1, *range(16)]]
        assert not record.windowed


@pytest.mark.parametrize(
    "options",
    [
        {"qk_norm": True},
        {"class_token": False, "global_pool": "avg"},
        {"reg_tokens": 4},
        {"name": "vit_small_patch16_rope_224"},
        {"name": "deit_tiny_distilled_patch16_224"},
        {"name": "vit_tiny_patch16_224", "img_size": (32, 80)},
    ],
    ids=str,
)
def test_weights_of_a_fused_vit_are_those_of_timm_without_fusion(options):
    model = models.vit(**options)
    images = models.pictures(options.get("img_size", 64))
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(images)
    with torch.no_grad():
        expected, _ = models.unfused(model, images)
    assert len(records) == len(expected) == 3
    for record, weights in zip(records, expected, strict=True):
        close(record.weights[:, 0], weights, atol=1e-5, rtol=0)
        assert record.grid == (images.shape[2] // 16, images.shape[3] // 16)
        assert record.num_prefix_tokens == model.num_prefix_tokens


class Toy(nn.Module):
    """4 × 4 patches, and one fused call with any arguments; `inputs` holds the queries and keys of every call."""

    def __init__(self, heads=4, groups=None, bias=None, **arguments):
        super().__init__()
        self.heads, self.groups = heads, groups or heads
        self.embed = nn.Conv2d(3, 8 * heads, 8, 8)
        self.query = nn.Linear(8 * heads, 8 * heads)
        self.key = nn.Linear(8 * heads, 8 * self.groups)
        self.bias, self.arguments = bias, arguments
        self.inputs = []

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        query = self.query(x).unflatten(2, (self.heads, 8)).transpose(1, 2)
        key = self.key(x).unflatten(2, (self.groups, 8)).transpose(1, 2)
        self.inputs.append((query.detach(), key.detach()))
        mask = {}
        if self.bias is not None:
            mask = {"attn_mask": self.bias[: len(images)] if self.bias.ndim == 4 else self.bias}
        out = F.scaled_dot_product_attention(query, key, key, **mask, **self.arguments)
        return out.transpose(1, 2).flatten(2).mean(1)


def random_mask(*shape, seed=3):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    return mask | torch.eye(16, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "by_hand"),
    [
        ({}, {}),
        ({"scale": 0.7}, {"scale": 0.7}),
        ({"is_causal": True}, {"causal": True}),
        ({"groups": 2, "enable_gqa": True}, {}),
        ({"groups": 1, "enable_gqa": True, "scale": 1.3, "is_causal": True}, {"scale": 1.3, "causal": True}),
        ({"groups": 1}, {}),
        ({"bias": torch.randn(16, 16, generator=torch.Generator().manual_seed(2))}, {}),
        ({"bias": torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(2)), "scale": 0.2}, {"scale": 0.2}),
        ({"bias": random_mask(16, 16)}, {}),
        ({"bias": random_mask(1, 4, 16, 16)}, {}),
        ({"bias": torch.randn(4, 1, 16, generator=torch.Generator().manual_seed(2))}, {}),
    ],
    ids=lambda value: "+".join(value) or "none",
)
@pytest.mark.parametrize("keep", [FullAttention(), HeadMean()], ids=["full", "head_mean"])
def test_every_argument_of_the_fused_call_is_used(arguments, by_hand, keep):
    torch.manual_seed(0)
    model, images = Toy(**arguments).eval(), models.pictures(32)
    bias = arguments.get("bias")
    if bias is not None:
        additive = torch.zeros(bias.shape).masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else bias
        by_hand = by_hand | {"bias": additive.expand(2, 4, 16, 16)}
    with torch.no_grad():
        expected_out = model(images)
        with capture(model, keep) as records:
            out = model(images)
    expected = softmax_by_hand(*model.inputs[0], **by_hand)
    if isinstance(keep, HeadMean):
        expected = expected.mean(1)
    close(records[0].weights[:, 0].double(), expected, atol=1e-5, rtol=0)
    close(out, expected_out, atol=1e-5, rtol=0)


def test_positional_arguments_are_used():
    class Positional(Toy):
        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            query, key = (f(x).unflatten(2, (self.heads, 8)).transpose(1, 2) for f in (self.query, self.key))
            self.inputs.append((query.detach(), key.detach()))
            return F.scaled_dot_product_attention(query, key, key, None, 0.0, True).mean(2).flatten(1)

    torch.manual_seed(0)
    model = Positional().eval()
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(models.pictures(32))
    expected = softmax_by_hand(*model.inputs[-1], causal=True)
    close(records[0].weights[:, 0].double(), expected, atol=1e-5, rtol=0)


class Masked(nn.Module):
    """Attention of 4 × 4 patches with a given mask, bias or types."""

    def __init__(self, *, mask=None, value_type=torch.float32):
        super().__init__()
        self.embed = nn.Conv2d(3, 24, 16, 16)
        self.mask = nn.Parameter(mask) if mask is not None and mask.is_floating_point() else mask
        self.value_type = value_type

    def forward(self, x):
        tokens = self.embed(x).flatten(2).transpose(1, 2)
        heads = tokens.unflatten(2, (3, 8)).transpose(1, 2).float()
        out = F.scaled_dot_product_attention(heads, heads, heads.to(self.value_type), attn_mask=self.mask)
        return out.transpose(1, 2).flatten(2).mean(1)


def test_keyword_and_positional_arguments_give_the_same_weights():
    class ByName(Masked):
        def forward(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            heads = tokens.unflatten(2, (3, 8)).transpose(1, 2)
            return F.scaled_dot_product_attention(query=heads, key=heads, value=heads).transpose(1, 2).mean((1, 2))

    torch.manual_seed(0)
    by_name, by_position = ByName().eval(), Masked().eval()
    by_position.load_state_dict(by_name.state_dict())
    images = models.pictures()
    with torch.no_grad():
        for keep in (HeadMean(), FullAttention()):
            with capture(by_name, keep) as found, capture(by_position, keep) as expected:
                by_name(images), by_position(images)
            close(found[0].weights, expected[0].weights)
            with capture(by_name, keep) as alone:
                by_name(images)
            close(alone[0].weights, found[0].weights, atol=1e-6, rtol=1e-5)


def test_a_query_whose_keys_are_all_masked_has_weights_of_zero():
    mask = torch.ones(16, 16, dtype=torch.bool)
    mask[3] = False
    model, images = Masked(mask=mask).eval(), models.pictures()
    with torch.no_grad():
        expected = model(images)
        for keep in (HeadMean(), FullAttention()):
            with capture(model, keep) as records:
                out = model(images)
            close(out, expected, atol=1e-6, rtol=0)
            sums = records[0].weights.sum(-1)
            assert (sums[..., 3] == 0).all()
            close(sums[..., 4:], torch.ones_like(sums[..., 4:]))


def test_a_learned_bias_keeps_its_gradient_during_capture():
    model, images = Masked(mask=torch.randn(16, 16)), models.pictures()
    model.embed.requires_grad_(False)
    model(images).sum().backward()
    expected, model.mask.grad = model.mask.grad, None
    with capture(model, HeadMean()):
        model(images).sum().backward()
    close(model.mask.grad, expected)


def test_values_may_have_another_type_than_queries():
    model, images = Masked(value_type=torch.bfloat16), models.pictures()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = model(images)
        with capture(model, HeadMean()) as records:
            found = model(images)
    assert torch.equal(found, expected)
    close(records[0].weights.sum(-1), torch.ones(2, 1, 16), atol=1e-5, rtol=0)


def test_weights_are_float32_with_another_default_dtype():
    model, images = models.vit(depth=2), models.pictures()
    with torch.no_grad():
        torch.set_default_dtype(torch.float64)
        try:
            with capture(model, HeadMean()) as records:
                model(images)
            heatmaps = Rollout()(model, images).heatmaps
        finally:
            torch.set_default_dtype(torch.float32)
    assert {record.weights.dtype for record in records} == {heatmaps.dtype} == {torch.float32}
