"""Capture: what is recorded is what the model computed, whatever the family; and the model never knows."""

import math
import threading

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tests.maps import models
from visionattn.errors import UsageError
from visionattn.maps import ClassRow, Full, HeadMean, Nothing, PatchRow, capture

close = torch.testing.assert_close


def softmax_by_hand(query, key, *, bias=None, scale=None, causal=False):
    """The equation, one query at a time: (B, H, Q, D), (B, G, K, D) → (B, H, Q, K)."""
    batch, heads, queries, width = query.shape
    groups = heads // key.shape[1]
    out = torch.zeros(batch, heads, queries, key.shape[2], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(queries):
                logits = [
                    float((query[b, h, i].double() * key[b, h // groups, j].double()).sum())
                    * (width**-0.5 if scale is None else scale)
                    for j in range(key.shape[2])
                ]
                for j in range(key.shape[2]):
                    if bias is not None:
                        logits[j] += float(bias[b, h, i, j])
                    if causal and j > i:
                        logits[j] = -math.inf
                top = max(logits)
                exps = [math.exp(logit - top) for logit in logits]
                out[b, h, i] = torch.tensor([e / sum(exps) for e in exps], dtype=torch.float64)
    return out


def by_hand_from_qkv(model, images):
    """Weights of every block of a timm ViT from the output of its qkv layer."""
    seen = []
    heads = model.blocks[0].attn.num_heads

    def keep(module, args, out):
        batch, tokens, _ = out.shape
        query, key, _ = out.reshape(batch, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
        seen.append(softmax_by_hand(query, key))

    handles = [block.attn.qkv.register_forward_hook(keep) for block in model.blocks]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


# What is recorded --------------------------------------------------------------------------------------------------


def test_weights_of_a_fused_vit_are_softmax_of_queries_and_keys():
    model, images = models.vit(depth=2), models.pictures()
    with torch.no_grad(), capture(model, Full()) as records:
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
    with torch.no_grad(), capture(model, Full()) as records:
        model(images)
    with torch.no_grad():
        expected, _ = models.unfused(model, images)
    assert len(records) == len(expected) == 3
    for record, weights in zip(records, expected, strict=True):
        close(record.weights[:, 0], weights, atol=1e-5, rtol=0)
        assert record.grid == (images.shape[2] // 16, images.shape[3] // 16)
        assert record.num_prefix_tokens == model.num_prefix_tokens


class Toy(nn.Module):
    """Four patches a side, attention with whatever arguments."""

    def __init__(self, heads=4, groups=None, bias=None, **arguments):
        super().__init__()
        self.heads, self.groups = heads, groups or heads
        self.embed = nn.Conv2d(3, 8 * heads, 8, 8)
        self.query = nn.Linear(8 * heads, 8 * heads)
        self.key = nn.Linear(8 * heads, 8 * self.groups)
        self.bias, self.arguments = bias, arguments
        self.seen = []

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        query = self.query(x).unflatten(2, (self.heads, 8)).transpose(1, 2)
        key = self.key(x).unflatten(2, (self.groups, 8)).transpose(1, 2)
        self.seen.append((query.detach(), key.detach()))
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
    ids=lambda value: "+".join(value) or "plain",
)
@pytest.mark.parametrize("keep", [Full(), HeadMean()], ids=["full", "head_mean"])
def test_every_argument_of_the_fused_call_is_heeded(arguments, by_hand, keep):
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
    expected = softmax_by_hand(*model.seen[0], **by_hand)
    if isinstance(keep, HeadMean):
        expected = expected.mean(1)
    close(records[0].weights[:, 0].double(), expected, atol=1e-5, rtol=0)
    close(out, expected_out, atol=1e-5, rtol=0)


def test_positional_arguments_are_heeded():
    class Positional(Toy):
        def forward(self, images):
            x = self.embed(images).flatten(2).transpose(1, 2)
            query, key = (f(x).unflatten(2, (self.heads, 8)).transpose(1, 2) for f in (self.query, self.key))
            self.seen.append((query.detach(), key.detach()))
            return F.scaled_dot_product_attention(query, key, key, None, 0.0, True).mean(2).flatten(1)

    torch.manual_seed(0)
    model = Positional().eval()
    with torch.no_grad(), capture(model, Full()) as records:
        model(models.pictures(32))
    expected = softmax_by_hand(*model.seen[-1], causal=True)
    close(records[0].weights[:, 0].double(), expected, atol=1e-5, rtol=0)


def torchvision_by_hand(model, images):
    """Weights of nn.MultiheadAttention from its own projections."""
    seen = []

    def keep(module, args):
        x, heads = args[0], module.num_heads
        query, key, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        query, key = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key))
        seen.append(softmax_by_hand(query, key))

    handles = [layer.self_attention.register_forward_pre_hook(keep) for layer in model.encoder.layers]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("mode", ["fast path", "with gradients", "training"])
def test_weights_inside_multihead_attention_are_seen(mode):
    model, images = models.torchvision_vit().train(mode == "training"), models.pictures()
    expected = torchvision_by_hand(model, images)
    with torch.set_grad_enabled(mode != "fast path"), capture(model, Full()) as records:
        model(images)
    assert [record.name for record in records] == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    for record, weights in zip(records, expected, strict=True):
        close(record.weights[:, 0].double(), weights, atol=1e-5, rtol=0)
        assert (record.grid, record.num_prefix_tokens) == ((4, 4), 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention_records_what_it_would_return(batch_first, need_weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)

        def forward(self, images, need_weights=need_weights):
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = x if batch_first else x.transpose(0, 1)
            out, weights = self.attention(x, x, x, need_weights=need_weights, average_attn_weights=False)
            return weights if need_weights else out

    torch.manual_seed(0)
    model, images = Net().eval(), models.pictures(32)
    with torch.no_grad(), capture(model, Full()) as records:
        model(images)
    with torch.no_grad():
        expected = model(images, need_weights=True)
    close(records["attention"].weights[:, 0], expected, atol=1e-6, rtol=0)


def test_encoder_layer_with_its_nested_fast_path_is_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

        def forward(self, images):
            return self.layer(self.embed(images).flatten(2).transpose(1, 2)).mean(1)

    torch.manual_seed(0)
    model = Net().eval()
    with torch.no_grad(), capture(model, Full()) as records:
        model(models.pictures(32))
    assert [record.name for record in records] == ["layer.self_attn"]
    close(records[0].weights.sum(-1), torch.ones(2, 1, 2, 16))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_weights_of_transformers_are_those_it_returns(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=64
    )
    config._attn_implementation = implementation
    model = models.stirred(transformers.ViTForImageClassification(config))
    images = models.pictures()
    with torch.no_grad(), capture(model, Full()) as records:
        model(images)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        expected = model(images, output_attentions=True).attentions
    assert len(records) == len(expected) == 2
    for record, weights in zip(records, expected, strict=True):
        close(record.weights[:, 0], weights, atol=1e-5, rtol=0)
        assert (record.grid, record.num_prefix_tokens) == ((4, 4), 1)


def test_eager_weights_are_the_very_ones_of_the_model():
    model, images = models.vit(), models.pictures()
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), capture(model, Full()) as records:
        model(images)
    with torch.no_grad():
        expected, _ = models.unfused(model, images)
    for record, weights in zip(records, expected, strict=True):
        assert torch.equal(record.weights[:, 0], weights)


# Windows on the image ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fused", [True, False])
def test_shifted_windows_are_put_back_on_the_grid_pixel_by_pixel(fused):
    model, images = models.swin(), models.pictures(32)
    raw = []
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.fused_attn = False
            block.attn.attn_drop.register_forward_hook(lambda module, args, out: raw.append(args[0].detach()))
    with torch.no_grad():
        model(images)
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.fused_attn = fused
    expected = list(raw)
    with torch.no_grad(), capture(model, Full()) as records, capture(model, ClassRow()) as means:
        model(images)
    assert len(records) == 4
    for place, (size, shift) in enumerate([(8, 0), (8, 2), (4, 0), (4, 0)]):
        record, windows = records[place], models.cells_of_windows(size, 4, shift)
        assert record.grid == (size, size)
        assert record.windowed == (size > 4)
        heads = record.heads
        weights = expected[place].reshape(2, len(windows), heads, 16, 16)
        grid = torch.zeros(2, size * size, size * size)  # from cell to cell of the image
        found = torch.zeros_like(grid)
        received = torch.zeros(2, size, size)  # mean over a window's queries of what a cell is given
        for b in range(2):
            for w, cells in enumerate(windows):
                for i, query in enumerate(cells):
                    for j, key in enumerate(cells):
                        value = float(sum(weights[b, w, h, i, j] for h in range(heads))) / heads
                        grid[b, query, key] = value
                        received[b, key // size, key % size] += value / 16
            for w in range(len(windows)):
                queries, keys = record.queries.index_WN[w].tolist(), record.keys.index_WN[w].tolist()
                for i, query in enumerate(queries):
                    for j, key in enumerate(keys):
                        found[b, query, key] = float(record.weights[b, w, :, i, j].mean())
        close(found, grid, atol=1e-5, rtol=0)
        close(record.keys.to_grid(means[place].weights.mean(2)), received, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (lambda: timm.create_model("maxvit_tiny_tf_224", depths=(1,), embed_dim=(32,), stem_width=16), 224),
        (lambda: torchvision.models.SwinTransformer([4, 4], 16, [2], [2], [3, 3], stochastic_depth_prob=0.0), 52),
    ],
    ids=["maxvit", "torchvision swin, padded"],
)
def test_windows_and_grids_of_others_cover_every_cell_once(make, size):
    model = models.stirred(make())
    with torch.no_grad(), capture(model, Full()) as records:
        model(models.pictures(size))
    assert records.attention
    for record in records.attention:
        cells = record.keys.index_WN[record.keys.index_WN >= 0]
        assert sorted(cells.tolist()) == list(range(record.grid[0] * record.grid[1]))
        close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]))


def test_maxvit_attends_first_inside_windows_then_across_a_dilated_grid():
    model = models.stirred(timm.create_model("maxvit_tiny_tf_224", depths=(1,), embed_dim=(32,), stem_width=16))
    with torch.no_grad(), capture(model, Nothing()) as records:
        model(models.pictures(224))
    block, grid = records.attention
    assert block.grid == grid.grid == (56, 56)
    for w, (row, column) in enumerate((i, j) for i in range(8) for j in range(8)):
        near = [(row * 7 + i) * 56 + column * 7 + j for i in range(7) for j in range(7)]
        far = [(row + i * 8) * 56 + column + j * 8 for i in range(7) for j in range(7)]
        assert block.keys.index_WN[w].tolist() == near
        assert grid.keys.index_WN[w].tolist() == far


# What is kept ------------------------------------------------------------------------------------------------------


def kept(model, images, keep, **options):
    with torch.no_grad(), capture(model, keep, **options) as records:
        model(images)
    return records.attention


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


# The model does not know that it is watched ------------------------------------------------------------------------

FAMILIES = {
    "vit": (models.vit, 64),
    "torchvision vit": (models.torchvision_vit, 64),
    "swin": (models.swin, 32),
    "resnet with gates": (lambda: models.resnet("seresnet18"), 64),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [ClassRow(), Full(), Nothing(), PatchRow(0, 0)], ids=lambda k: type(k).__name__)
def test_outputs_are_the_same_bit_for_bit_while_watched(family, keep):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    with torch.no_grad():
        expected = model(images)
        with capture(model, keep):
            found = model(images)
    if family == "torchvision vit":  # its fast path, one opaque kernel, is switched off
        close(found, expected, atol=1e-5, rtol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_agree_to_rounding_where_the_head_mean_takes_the_place_of_the_fused_call(family):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    with torch.no_grad():
        expected = model(images)
        with capture(model, HeadMean()):
            found = model(images)
    close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [Full(), HeadMean()], ids=["full", "head_mean"])
def test_gradients_are_the_same_while_watched(family, keep):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    model(images).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with capture(model, keep):
        model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_dropout_draws_the_same_numbers_while_watched():
    model, images = models.vit(drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3).train(), models.pictures()
    torch.manual_seed(5)
    expected = model(images)
    torch.manual_seed(5)
    with capture(model, HeadMean()) as records:
        assert torch.equal(model(images), expected)
    close(records[0].weights.sum(-1), torch.ones(2, 1, 17))  # weights before dropout
    assert model.training


class BrokenError(Exception):
    pass


@pytest.mark.parametrize("ending", ["well", "in the model", "in the body", "in the survey"])
@pytest.mark.parametrize("family", ["vit", "torchvision vit"])
def test_all_is_as_before_afterwards(family, ending):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    model.train()
    blocks = model.blocks if family == "vit" else model.encoder.layers
    next(blocks.children()).eval()  # flags that differ from module to module
    next(model.parameters()).requires_grad_(False)
    for parameter in list(model.parameters())[5:9]:
        parameter.grad = torch.ones_like(parameter)

    def breaks(module, args):
        if ending == "in the survey" or len(args[0]) == 2:
            raise BrokenError

    handle = list(blocks.children())[1].register_forward_pre_hook(breaks) if ending.startswith("in the ") else None
    if ending == "in the body":
        handle.remove()
    before = models.state_of(model)
    if ending == "well":
        with torch.no_grad(), capture(model):
            model(images)
    else:
        with pytest.raises(BrokenError), torch.no_grad(), capture(model):  # noqa: PT012 - the body is what is tested
            model(images)
            raise BrokenError
    models.assert_same_state(before, models.state_of(model))
    assert not torch.is_inference_mode_enabled()
    if ending not in ("well", "in the body"):
        handle.remove()
    with torch.no_grad(), capture(model) as records:  # and it can be watched again
        model(images)
    assert len(records) == (3 if family == "vit" else 2)


# Circumstances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
@pytest.mark.parametrize("family", ["vit", "torchvision vit", "swin"])
@pytest.mark.parametrize("frozen", [True, False])
def test_it_works_frozen_and_in_every_gradient_mode(context, family, frozen):
    make, size = FAMILIES[family]
    model, images = make().requires_grad_(not frozen), models.pictures(size)
    reference = kept(model, images, Full())
    with context(), capture(model, Full()) as records:
        out = model(images)
    assert out.requires_grad == (not frozen and context is torch.enable_grad)
    for record, expected in zip(records, reference, strict=True):
        assert not record.weights.requires_grad
        close(record.weights, expected.weights, atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["vit", "torchvision vit", "swin"])
def test_it_works_in_bfloat16(family):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    expected = kept(model, images, HeadMean())
    for record, reference in zip(kept(model.bfloat16(), images.bfloat16(), HeadMean()), expected, strict=True):
        assert record.weights.dtype == torch.float32
        close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]), atol=2e-2, rtol=0)
        close(record.weights, reference.weights, atol=0.1, rtol=0)


def test_it_works_under_autocast():
    model, images = models.vit(), models.pictures()
    expected = kept(model, images, HeadMean())
    with torch.autocast("cpu", torch.bfloat16):
        found = kept(model, images, HeadMean())
    for record, reference in zip(found, expected, strict=True):
        close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]))
        close(record.weights, reference.weights, atol=0.1, rtol=0)


@pytest.mark.parametrize("how", ["torch.compile", "model.compile", "a block", "a function"])
def test_compiled_models_are_watched(how):
    import torch._dynamo

    torch._dynamo.reset()
    model, images = models.vit(depth=2), models.pictures()
    expected = kept(model, images, Full())
    compiled = model
    if how == "torch.compile":
        compiled = torch.compile(model, backend="eager")
    elif how == "model.compile":
        model.compile(backend="eager")
    elif how == "a block":
        model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    else:
        model.blocks[1].attn.forward = torch.compile(model.blocks[1].attn.forward, backend="eager")
    with torch.no_grad():
        plain = compiled(images)  # compiled before it is watched
        found = kept(compiled, images, Full())
        assert len(found) == 2
        for record, reference in zip(found, expected, strict=True):
            close(record.weights, reference.weights, atol=1e-5, rtol=0)
        close(compiled(images), plain)


def test_data_parallel_models_are_watched():
    model, images = models.vit(depth=2), models.pictures()
    assert len(kept(nn.DataParallel(model), images, Full())) == 2


def test_a_part_of_a_model_can_be_watched():
    model, images = models.vit(), models.pictures()
    net = nn.Sequential(model, nn.Linear(7, 2))
    records = kept(net, images, Full())
    assert [record.name for record in records] == [f"0.blocks.{i}.attn" for i in range(3)]
    with torch.no_grad(), capture(model, Full()) as inner:
        net(images)
    close(inner[0].weights, records[0].weights)
    assert inner[0].name == "blocks.0.attn"


def test_two_threads_watch_two_models_and_do_not_hear_each_other():
    nets = [models.torchvision_vit(), models.torchvision_vit(), models.vit()]
    batches = [models.pictures(seed=seed) for seed in range(3)]
    expected = [kept(net, images, Full()) for net, images in zip(nets, batches, strict=True)]
    before = models.state_of(nets[0])
    barrier, found, errors = threading.Barrier(3), [[] for _ in nets], []

    def work(place):
        try:
            for _ in range(10):
                barrier.wait(20)
                found[place].append(kept(nets[place], batches[place], Full()))
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(place,)) for place in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    for reference, rounds in zip(expected, found, strict=True):
        for records in rounds:
            assert len(records) == len(reference)
            for record, one in zip(records, reference, strict=True):
                close(record.weights, one.weights, atol=1e-6, rtol=0)
    models.assert_same_state(before, models.state_of(nets[0]))


def test_contexts_of_two_threads_that_overlap_leave_the_functions_of_torch_as_they_were():
    originals = (F.scaled_dot_product_attention, F.softmax)
    before = torch.backends.mha.get_fastpath_enabled()
    model, images = models.torchvision_vit(), models.pictures()
    first_in, second_in, first_out = threading.Event(), threading.Event(), threading.Event()

    def first():
        with torch.no_grad(), capture(model) as records:
            first_in.set()
            second_in.wait(20)
            model(images)
        assert len(records) == 2
        first_out.set()

    def second():
        first_in.wait(20)
        other = models.torchvision_vit()
        with torch.no_grad(), capture(other) as records:
            second_in.set()
            first_out.wait(20)
            other(images)
        assert len(records) == 2

    threads = [threading.Thread(target=work) for work in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (F.scaled_dot_product_attention, F.softmax) == originals
    assert torch.backends.mha.get_fastpath_enabled() == before


def test_a_thread_that_does_not_watch_is_not_heard():
    model, images = models.vit(), models.pictures()
    with torch.no_grad(), capture(model) as records:
        thread = threading.Thread(target=lambda: model(images))
        thread.start()
        thread.join()
        assert (len(records), records.calls) == (0, 0)
        model(images)
    assert len(records) == 3


# Never silently empty ----------------------------------------------------------------------------------------------


class Own(nn.Module):
    """Attention by exp and a sum: nothing of it can be heard."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)

    def forward(self, images):
        x = self.embed(images).flatten(2).transpose(1, 2)
        weights = (x @ x.mT / 4).exp()
        return (weights / weights.sum(-1, keepdim=True) @ x).mean(1)


class HomemadeAttention(Own):
    pass


def test_a_model_that_attends_unheard_is_an_error_that_says_where():
    net = nn.Sequential()
    net.add_module("mine", HomemadeAttention())
    with pytest.raises(UsageError, match="mine looks like attention and calls neither"), capture(net):
        net(models.pictures(32))


def test_what_was_missed_is_named_beside_what_was_seen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.vit, self.mine = models.vit(), HomemadeAttention()

        def forward(self, images):
            return self.vit(images), self.mine(images)

    net = Net()
    with torch.no_grad(), capture(net) as records:
        net(models.pictures())
    assert records.missed == ["mine"]
    assert len(records) == 3
    assert "1 look like attention and were not seen to attend\n  mine" in records.report()
    assert "  vit.blocks.0.attn: self, grid 4×4, 3 heads" in repr(records)


def test_a_softmax_over_channels_is_named_and_is_not_taken_for_attention():
    model = models.stirred(timm.create_model("xcit_nano_12_p16_224", depth=1, cls_attn_layers=1))
    with torch.no_grad(), capture(model, Full()) as records:
        model(models.pictures(64))
    assert [record.name for record in records.attention] == ["cls_attn_blocks.0.attn"]
    assert records.other == {"blocks.0.attn": "it attends over channels or learned tokens, not over positions"}
    assert "blocks.0.attn: it attends over channels" in records.report()


def test_queries_and_keys_of_unknown_places_are_named():
    class Shuffled(nn.Module):
        """Numpy hides where its tokens come from."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)

        def forward(self, images):
            x = torch.from_numpy(self.embed(images).detach().numpy()).flatten(2).mT
            return F.scaled_dot_product_attention(x, x, x).mean(1)

    net = nn.Sequential(Shuffled())
    with pytest.raises(UsageError, match="0: the positions of its keys are not known"), capture(net):
        net(models.pictures(32))


def test_a_model_that_is_never_called_gives_no_error_and_no_records():
    with capture(models.vit(depth=1)) as records:
        pass
    assert len(records) == 0
    assert records.calls == 0


def test_attention_that_appears_only_later_is_reported_and_then_surveyed():
    class Fickle(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.twice = nn.Conv2d(3, 16, 8, 8), False

        def forward(self, images):
            x = self.embed(images).flatten(2).mT
            for _ in range(1 + self.twice):
                x = x + F.scaled_dot_product_attention(x, x, x)
            return x.mean(1)

    model, images = Fickle(), models.pictures(32)
    assert len(kept(model, images, Full())) == 1
    model.twice = True
    with torch.no_grad(), capture(model, Full()) as records:
        model(images)
    assert len(records) == 1
    assert "not seen to attend when the model was surveyed" in records.report()
    assert len(kept(model, images, Full())) == 2


def test_an_exception_of_the_body_is_not_replaced_by_that_of_an_empty_capture():
    model = models.resnet()
    with pytest.raises(BrokenError), capture(model) as records:  # noqa: PT012 - the body is what is tested
        model(models.pictures())
        assert len(records) == 0
        raise BrokenError
