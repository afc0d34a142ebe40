"""Test swapped self-attention in timm's ViTs: outputs, weights, removal, export, and errors."""

import copy
from functools import partial

import pytest
import timm
import torch
from torch import nn

from tests.attention.self_attention.attended_by_hand import MASKED, attended, weights_by_hand
from tests.capture import models
from tests.refusals import refuses
from tests.versions import needs_onnx_exporter
from visionattn.attention import (
    CBAM,
    AdaptiveSpan,
    Dense,
    Neighbourhood,
    PooledKeys,
    TokenMerging,
    TokenPruning,
    TopK,
    Windowed,
    insert,
    mean_span,
    reduce_tokens,
    spans,
    swap_attention,
)
from visionattn.errors import UsageError
from visionattn.models import Classifier

close = torch.testing.assert_close
VITS = {
    "vit_tiny_patch16_224": {},
    "vit_tiny_patch16_224, qk norm, dynamic size": {"qk_norm": True, "dynamic_img_size": True},
    "vit_small_patch14_reg4_dinov2": {"img_size": 56},
    "vit_small_patch16_dinov3": {},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "vit_medium_patch16_reg1_gap_256": {},
    "vit_small_patch16_rope_224": {},
    "vit_base_patch16_siglip_224": {},
}
WHOLE_GRID = [  # forms in which every patch attends to all patches
    Dense, partial(Windowed, window=8), partial(Neighbourhood, size=9), partial(PooledKeys, pool=1),
    partial(TopK, k=64), partial(AdaptiveSpan, max_span=8, init=1),
]  # fmt: skip


def vit_of(name):
    return models.vit(name=name.split(",")[0], **VITS[name])


@pytest.mark.parametrize("name", VITS)
def test_mechanisms_that_cover_the_whole_grid_keep_outputs_and_gradients(name):
    model, images = vit_of(name), models.pictures(VITS[name].get("img_size", 64))
    model.train()  # `remove` must restore the training mode as well
    outputs = []
    for part in (None, *WHOLE_GRID):
        swap = part and swap_attention(model, part)
        assert model.training
        model.eval()
        found = model(images)
        found.square().sum().backward()
        outputs.append([found, *(parameter.grad.clone() for parameter in parameters_of_vit(model))])
        model.zero_grad()
        model.train()
        if swap:
            swap.remove()
    for found in outputs[1:]:
        for value, expected in zip(found, outputs[0], strict=True):
            close(value, expected, atol=1e-5 * max(1, float(expected.detach().abs().max())), rtol=0)


def parameters_of_vit(model):
    """Return the parameters with gradients, except the parameters of the mechanisms."""
    return [p for name, p in model.named_parameters() if "mechanism" not in name and p.grad is not None]


@pytest.mark.parametrize("name", ["windowed, shifted", "neighbourhood", "adaptive span"])
def test_output_of_a_block_matches_the_mechanisms_equation(name):
    """Compare the attention of a ViT's single block with attention computed pair by pair from its weights."""
    make, m = MASKED[name]
    model = models.vit(img_size=(64, 96), depth=1)
    swap_attention(model, make)
    attention = model.blocks[0].attn
    calls = []
    attention.register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
    model(models.pictures((64, 96)))
    x, out = calls[0]
    q, k, v = attention.qkv(x).reshape(2, 25, 3, 3, 16).permute(2, 0, 3, 1, 4)
    expected, _ = attended(q, k, v, weights_by_hand(m, 3, (4, 6), 1))
    close(out, attention.proj(expected.float().transpose(1, 2).reshape(2, 25, 48)), atol=1e-5, rtol=1e-4)


def test_swapped_model_accepts_the_same_image_sizes():
    model = models.vit(dynamic_img_size=True)
    sizes = [(64, 64), (32, 96), (16, 160), (64, 64)]
    before = [model(models.pictures(size)) for size in sizes]
    swap_attention(model, partial(Windowed, window=10))  # a window covers each of these grids
    for size, expected in zip(sizes, before, strict=True):
        close(model(models.pictures(size)), expected, atol=1e-5, rtol=1e-4)
    model_with_small_windows = models.vit(dynamic_img_size=True)
    swap_attention(model_with_small_windows, partial(Windowed, window=3))
    assert not torch.allclose(model_with_small_windows(models.pictures((32, 96))), before[1], atol=1e-3)


def test_weights_keep_their_names_and_load_strictly_both_ways():
    original, model = models.vit(), models.vit()
    swap = swap_attention(model, partial(AdaptiveSpan, max_span=3))
    new = {f"blocks.{block}.attn.mechanism.span" for block in range(3)}
    assert model.state_dict().keys() == original.state_dict().keys() | new
    assert [name for name, _ in model.named_parameters() if "mechanism" not in name] == [
        name for name, _ in original.named_parameters()
    ]
    # strict, although the original has no spans; the model's spans keep their values
    model.load_state_dict(original.state_dict())
    with torch.no_grad():
        swap.places["blocks.1.attn"].mechanism.span.copy_(torch.tensor([0.1, 0.2, 0.3]))
    second = models.vit()
    swap_attention(second, partial(AdaptiveSpan, max_span=3))
    second.load_state_dict(model.state_dict())
    close(spans(second)["blocks.1.attn.mechanism"].detach(), torch.tensor([0.3, 0.6, 0.9]))
    # six heads keep the initial span of 1.5; the spans of three heads are 0.3, 0.6 and 0.9
    close(mean_span(second).detach(), torch.tensor((1.5 * 6 + 1.8) / 9))
    assert mean_span(original) is None
    assert "spans 0.3, 0.6, 0.9 of 3, ramp 2" in repr(swap)


def test_remove_restores_the_model_with_its_trained_weights():
    model, images = models.vit(), models.pictures()
    attentions = [block.attn for block in model.blocks]
    swap = swap_attention(model, partial(Windowed, window=2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model.train()(images).square().sum().backward()
    optimizer.step()
    model.eval()
    swap.remove()
    swap.remove()
    assert [block.attn for block in model.blocks] == attentions
    original = models.vit()
    before = {name: parameter.clone() for name, parameter in original.named_parameters()}
    original.load_state_dict(model.state_dict())
    assert torch.equal(original(images), model(images))
    assert not torch.equal(before["blocks.0.attn.qkv.weight"], model.blocks[0].attn.qkv.weight)
    assert not any(module._forward_hooks or module._load_state_dict_pre_hooks for module in model.modules())
    assert not any(module.training for module in model.modules())


def test_deepcopy_has_its_own_grid():
    model = models.vit(dynamic_img_size=True)
    swap_attention(model, partial(Windowed, window=2))
    copied = copy.deepcopy(model)
    small, large = models.pictures(32), models.pictures(64)
    expected = model(large)
    copied(small)
    close(copied(large), expected)
    assert copied.blocks[0].attn.grid is not model.blocks[0].attn.grid


def test_layers_are_chosen_by_name_and_mechanisms_alternate():
    model = models.vit()
    swap = swap_attention(model, [partial(Windowed, window=2), partial(Windowed, window=2, shift=1)])
    assert [part.mechanism.shift for part in swap.places.values()] == [0, 1, 0]
    swap.remove()
    swap = swap_attention(model, Dense, at=["blocks.2.attn", "blocks.0.*"])
    assert list(swap.places) == ["blocks.0.attn", "blocks.2.attn"]
    assert type(model.blocks[1].attn) is timm.layers.Attention
    with pytest.raises(UsageError, match=r"no attention module of this VisionTransformer is named 'block.0.attn'"):
        swap_attention(model, Dense, at="block.0.attn")
    with pytest.raises(
        UsageError, match=r"the attention of blocks.0.attn of this VisionTransformer is swapped already"
    ):
        swap_attention(model, Dense, at="blocks.0.attn")
    refuses(UsageError, "at least one factory", swap_attention, model, [], at="blocks.1.attn")


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: timm.create_model("beit_base_patch16_224", img_size=32, depth=1, embed_dim=24),
            "relative-position bias",
        ),
        (lambda: models.vit(name="vit_relpos_small_patch16_224"), "blocks.0.attn .* RelPosAttention with a relative"),
        (models.swin, "layers.0.blocks.0.attn .* WindowAttention with a relative-position bias"),
        (lambda: models.resnet(), "this ResNet has no self-attention that can be swapped"),
        (
            models.torchvision_vit,
            "MultiheadAttention; attention that can be swapped: Attention, AttentionRope, EvaAttention of timm",
        ),
        (
            lambda: models.vit(name="vit_little_patch16_reg1_gap_256", attn_layer="diff"),
            "DiffAttention; attention that can be swapped: ",
        ),
        (lambda: nn.Sequential(models.vit()), "whose patch_embed gives the grid; this Sequential is not one"),
    ],
)
def test_impossible_swaps_raise_and_leave_the_model_unchanged(make, text):
    model = make()
    before = {name: type(module) for name, module in model.named_modules()}
    refuses(UsageError, text, swap_attention, model, Dense)
    assert {name: type(module) for name, module in model.named_modules()} == before


def test_unsupported_calls_of_swapped_attention_raise():
    model = models.vit(patch_drop_rate=0.5)
    swap_attention(model, partial(Windowed, window=2))
    refuses(UsageError, r"needs every token of the grid.*patch_drop_rate", lambda: model.train()(models.pictures()))
    with pytest.raises(UsageError, match="accepts no mask"):
        model.eval().blocks[0].attn(torch.zeros(1, 17, 48), attn_mask=torch.zeros(17, 17))
    unused = models.vit()  # no image has run through this ViT, so its grid is unknown
    swap_attention(unused, Dense)
    refuses(UsageError, "call the whole ViT", lambda: unused.blocks[0](torch.zeros(1, 17, 48)))


def test_classifier_loads_weights_before_it_swaps_attention(tmp_path):
    options = {"img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
    original = models.randomised(timm.create_model("vit_tiny_patch16_224", num_classes=5, **options))
    torch.save(original.state_dict(), tmp_path / "vit.pth")
    make = partial(
        Classifier, "vit_tiny_patch16_224", num_classes=5, weights=str(tmp_path / "vit.pth"), options=options
    )
    images = models.pictures()
    close(make(self_attention=[partial(Windowed, window=4)]).eval()(images), original(images), atol=1e-5, rtol=1e-4)
    swapped = make(self_attention=[partial(Windowed, window=2)], self_attention_at="blocks.0.attn").eval()
    assert not torch.allclose(swapped(images), original(images), atol=1e-3)
    assert type(swapped.backbone.blocks[1].attn) is timm.layers.Attention


def test_insert_works_in_a_vit_with_swapped_attention():
    from visionattn.attention import SE

    model, images = models.vit(), models.pictures()
    swap_attention(model, partial(Windowed, window=2))
    expected = model(images)
    inserted = insert(model, SE, at="blocks")
    close(model(images), expected)
    inserted.remove()


def test_swapped_vit_compiles_and_exports():
    model, images = models.vit(depth=4, img_size=(64, 96)), models.pictures((64, 96))
    names = ("windowed, shifted", "neighbourhood", "adaptive span", "block-sparse")
    swap_attention(model, [MASKED[name][0] for name in names])
    with torch.no_grad():
        expected = model(images)
        close(torch.compile(model, backend="eager", fullgraph=True)(images), expected, atol=1e-5, rtol=1e-4)
        exported = torch.export.export(model, (images,), strict=False)
        close(exported.module()(images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@needs_onnx_exporter
@pytest.mark.parametrize("name", list(MASKED))
def test_swapped_vit_exports_to_onnx(name, tmp_path):
    import onnxruntime

    model, images = models.vit(depth=2, img_size=(64, 96)), models.pictures((64, 96))
    swap_attention(model, MASKED[name][0])
    with torch.no_grad():
        expected = model(images)
        torch.onnx.export(model, (images,), tmp_path / "vit.onnx", dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / "vit.onnx", providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("reduction", [TokenMerging(2), TokenPruning(keep=0.5)])
def test_insertion_swapping_and_token_reduction_refuse_each_other_and_change_nothing(reduction):
    model, images = timm.create_model("test_vit", img_size=64).eval(), torch.randn(1, 3, 64, 64)
    reduced = reduce_tokens(model, reduction)
    before = model(images)
    refuses(
        UsageError,
        "the tokens of this VisionTransformer are reduced",
        swap_attention,
        model,
        partial(Windowed, window=2),
    )
    refuses(UsageError, "the tokens of this VisionTransformer are reduced", insert, model, CBAM, at="blocks")
    assert torch.equal(model(images), before)
    reduced.remove()
    insertion = insert(model, CBAM, at="blocks")
    before = model(images)
    refuses(UsageError, r"the mechanism inserted into block \d needs every token", reduce_tokens, model, reduction)
    assert torch.equal(model(images), before)
    insertion.remove()
    reduce_tokens(model, reduction)
