"""Test token merging and pruning: against the papers' equations, in training and export, and with invalid use."""

import copy
import pickle
import threading

import pytest
import timm
import torch
import torchvision
from torch import nn

from tests.attention.self_attention import tokens_by_hand as by_hand
from tests.capture import models
from tests.refusals import refuses
from tests.versions import needs
from visionattn.attention import CBAM, TokenMerging, TokenPruning, insert, reduce_tokens
from visionattn.attention.self_attention.token_reduction import Heads, Held, class_attention, most_similar_pairs
from visionattn.errors import UsageError

close = torch.testing.assert_close

RATES, KEEP = (3, 2, 4, 5), {0: 0.7, 2: 0.6}
WITHOUT_CLASS_TOKEN = ("mean", "attention pooling")


def merging(rate=RATES):
    return TokenMerging(rate)


def pruning(keep=KEEP, **options):
    return TokenPruning(list(keep.values()), blocks=list(keep), **options)


REDUCTIONS = {  # name: (factory, reference for a network)
    "merged": (merging, lambda model: by_hand.merge(model, RATES)),
    "fused": (pruning, lambda model: by_hand.prune(model, KEEP)),
    "dropped": (lambda: pruning(fuse=False), lambda model: by_hand.prune(model, KEEP, fuse=False)),
}
both = pytest.mark.parametrize("reduction", [merging, pruning], ids=["merged", "pruned"])


def with_reduction(model, reduction):
    """Reduce the tokens of a model, and return the model."""
    reduce_tokens(model, reduction)
    return model


# Equations ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", by_hand.ALL)
@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduced_network_matches_the_equations_token_by_token(kind, name):
    make, reduce = REDUCTIONS[name]
    model, images = by_hand.network(kind), by_hand.images()
    unreduced = model(images)
    if name != "merged" and kind in WITHOUT_CLASS_TOKEN:
        with pytest.raises(UsageError, match="TokenPruning needs a class token, and this VisionTransformer has none"):
            reduce_tokens(model, make())
        return
    expected = by_hand.run(model, images[1], reduce(model)).logits
    found = with_reduction(model, make())(images)
    close(found[1], expected, atol=1e-10, rtol=0)
    assert (found - unreduced).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["class token", "rotary, registers"])
@pytest.mark.parametrize("name", ["merged", "fused"])
def test_gradients_match_the_equations(kind, name):
    make, reduce = REDUCTIONS[name]
    model, image = by_hand.network(kind), by_hand.images(1).requires_grad_()
    weights = torch.arange(5.0, dtype=torch.float64)
    inputs = [image, *model.parameters()]
    expected = torch.autograd.grad(by_hand.run(model, image[0], reduce(model)).logits @ weights, inputs)
    found = torch.autograd.grad((with_reduction(model, make())(image) @ weights).sum(), inputs)
    for gradient, reference in zip(found, expected, strict=True):
        close(gradient, reference, atol=1e-9, rtol=1e-7)
    assert found[0].any()


@pytest.mark.parametrize("patches", [1, 2, 3, 8, 9])
def test_most_similar_pairs_match_a_search(patches):
    key = torch.randn(2, 3, patches, 4, generator=torch.Generator().manual_seed(patches))
    for rate in range(1, patches // 2 + 1):
        moved, into, kept = most_similar_pairs(key, rate)
        for b in range(2):
            mean = key[b].mean(0)
            pairs = [
                max((by_hand.cosine(mean[a], mean[o]), a // 2, o // 2) for o in range(1, patches, 2))
                for a in range(0, patches, 2)
            ]
            best = sorted(pairs, reverse=True)[:rate]
            assert list(zip(moved[b].tolist(), into[b].tolist(), strict=True)) == [pair[1:] for pair in best]
            assert kept[b].tolist() == sorted({a // 2 for a in range(0, patches, 2)} - set(moved[b].tolist()))


def random_heads(tokens, *, batch=2, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(batch, 3, tokens, 4, generator=generator, dtype=dtype) for _ in range(2))
    return Heads(query.requires_grad_(), key.requires_grad_(), None, 0.5, False)


def test_merging_keeps_the_weighted_mean_and_all_patches():
    """The sizes always sum to the number of tokens, and repeated merging keeps the size-weighted mean."""
    x = torch.randn(3, 2 + 23, 6, dtype=torch.float64)
    held, mean = Held(2), x[:, 2:].mean(1)
    for rate in (4, 3, 9, 9):
        x, held = TokenMerging(rate)(x, held, random_heads(x.shape[1], batch=3), rate)
        size = held.size_BN
        assert torch.equal(size[:, :2], torch.ones(3, 2))
        assert torch.equal(size.sum(1), torch.full((3,), 25.0))
        close((x * size[..., None])[:, 2:].sum(1) / 23, mean)


@both
def test_gradients_match_finite_differences(reduction):
    part = reduction()
    heads = random_heads(2 + 9, batch=1)
    x = torch.randn(1, 11, 3, dtype=torch.float64, requires_grad=True)
    held = Held(2, torch.randint(1, 5, (1, 11)).double())

    def run(x, query, key):
        return part(x, held, Heads(query, key, None, 0.5, False), 3 if reduction is merging else 0.5)[0]

    assert torch.autograd.gradcheck(run, (x, heads.query_BHND, heads.key_BHND))


def test_class_attention_is_the_class_tokens_row_of_the_softmax():
    heads = random_heads(7)
    query, key = heads.query_BHND.detach(), heads.key_BHND.detach()
    expected = models.softmax_by_hand(query, key, scale=0.5)[:, :, 0].mean(1)
    close(class_attention(heads, 1).detach(), expected)


# Rates --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", [TokenMerging(0), TokenMerging([0, 0, 0, 0]), TokenPruning(1.0)], ids=repr)
@pytest.mark.parametrize("kind", by_hand.ALL)
def test_rate_zero_keeps_outputs_bit_by_bit(kind, reduction):
    if kind in WITHOUT_CLASS_TOKEN and isinstance(reduction, TokenPruning):
        return
    model, images = by_hand.network(kind).float().train(), by_hand.images().float()
    expected = model(images)
    assert torch.equal(with_reduction(model, reduction)(images), expected)


def token_counts(model, images):
    """Return the number of tokens in every block's MLP."""
    counts = []
    handles = [
        block.mlp.register_forward_hook(lambda m, args, out: counts.append(out.shape[1])) for block in model.blocks
    ]
    model(images)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize(
    ("reduction", "expected"),
    [
        (TokenMerging(3), [21, 18, 15, 12]),
        (TokenMerging(3, decreasing=True), [18, 14, 12, 12]),
        (TokenMerging(99), [12, 6, 3, 2]),  # a block merges at most half of its patches
        (TokenMerging([0, 5, 0, 1]), [24, 19, 19, 18]),
        (TokenPruning(0.7), [24, 18, 14, 11]),  # ⌈.7 · 24⌉ = 17, ⌈.7 · 18⌉ = 13, ⌈.7 · 14⌉ = 10, plus one fused token
        (TokenPruning(0.7, fuse=False), [24, 17, 12, 9]),
        (TokenPruning([0.5, 0.01], blocks=[0, 3]), [13, 13, 13, 2]),
    ],
    ids=repr,
)
@pytest.mark.parametrize("kind", ["class token", "layer scale, registers"])
def test_blocks_have_the_expected_number_of_tokens(kind, reduction, expected):
    model = by_hand.network(kind)
    found = token_counts(with_reduction(model, reduction), by_hand.images())
    assert [count - model.num_prefix_tokens for count in found] == expected


def test_schedules_of_rates_match_the_papers():
    assert TokenMerging(13, decreasing=True).rates(12) == [26, 24, 21, 19, 17, 14, 12, 9, 7, 5, 2, None]
    assert TokenMerging(13).rates(12) == [13] * 12
    assert TokenPruning(0.7).rates(12) == [None] * 3 + [0.7] + [None] * 2 + [0.7] + [None] * 2 + [0.7] + [None] * 2


# Use ---------------------------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("kind", ["class token", "rotary, registers"])
def test_images_of_a_batch_are_independent(reduction, kind):
    model, images = with_reduction(by_hand.network(kind), reduction()), by_hand.images(3)
    together = model(images)
    for image, logits in zip(images, together, strict=True):
        close(model(image[None])[0], logits)
    if kind == "class token":  # timm's Eva rejects an empty batch
        assert model(images[:0]).shape == (0, 5)


@both
def test_prefix_tokens_stay_even_if_their_keys_equal_a_patchs_key(reduction):
    x = torch.randn(2, 5 + 8, 6, dtype=torch.float64)
    heads = random_heads(13)
    with torch.no_grad():
        heads.key_BHND[:, :, :5] = heads.key_BHND[:, :, 5:6]  # the key of the first patch
    out, _ = reduction()(x, Held(5), heads, 4 if reduction is merging else 0.3)
    assert torch.equal(out[:, :5], x[:, :5])


@both
@pytest.mark.parametrize("precision", ["bfloat16", "autocast"])
def test_bfloat16_and_autocast_are_close_to_float32(reduction, precision):
    model, images = with_reduction(by_hand.network().float(), reduction()), by_hand.images(4).float()
    expected_counts = token_counts(model, images)
    if precision == "bfloat16":
        found = copy.deepcopy(model).bfloat16()(images.bfloat16())
        assert found.dtype == torch.bfloat16
        assert token_counts(copy.deepcopy(model).bfloat16(), images.bfloat16()) == expected_counts
    else:
        with torch.autocast("cpu", torch.bfloat16):
            found = model(images)
    assert found.isfinite().all()
    # given the same keys, both precisions remove the same tokens, so the results are close
    part, x, heads = reduction(), torch.randn(2, 13, 6), random_heads(13, dtype=torch.float32)
    rate = 4 if reduction is merging else 0.5
    with torch.no_grad():
        expected, _ = part(x, Held(1), heads, rate)
        found, held = part(x.bfloat16(), Held(1), heads, rate)
    close(found.float(), expected, atol=3e-2, rtol=2e-2)
    assert held.size_BN is None or held.size_BN.dtype == torch.float32  # bfloat16 could not count to 257


@both
def test_reduced_network_trains_every_weight(reduction):
    model, images = with_reduction(by_hand.network().float().train(), reduction()), by_hand.images(4).float()
    labels = torch.tensor([0, 1, 2, 3])
    optimizer, losses = torch.optim.SGD(model.parameters(), 0.01), []
    for _ in range(12):
        optimizer.zero_grad()
        losses.append(nn.functional.cross_entropy(model(images), labels))
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    assert all(parameter.grad.any() for parameter in model.parameters())


@both
@pytest.mark.parametrize("kind", ["class token", "rotary, mean"])
def test_activation_checkpointing_gives_the_same_gradients(reduction, kind):
    model, images = with_reduction(by_hand.network(kind), reduction()).train(), by_hand.images()
    gradients = []
    for recompute in (False, True):
        model.set_grad_checkpointing(recompute)
        first, second = model(images), model(images.flip(0))  # two forward passes before both backward passes
        gradients.append(torch.autograd.grad((first * second).sum(), list(model.parameters())))
    for found, expected in zip(*gradients, strict=True):
        close(found, expected)


@needs("torch", "2.14", "the compilation of attributes of tensors")
@both
def test_reduced_network_compiles_in_one_graph_and_exports_for_any_batch(reduction):
    torch._dynamo.reset()
    part = TokenMerging([3, 2]) if reduction is merging else TokenPruning(0.5, blocks=[0])
    model, images = with_reduction(by_hand.network(depth=2).float(), part), by_hand.images(3).float()
    with torch.no_grad():
        expected = model(images)
        close(torch.compile(model, backend="aot_eager", fullgraph=True)(images), expected)
        batch = torch.export.Dim("batch", max=1 << 24)  # without `max`, torch 2.6 raises an error
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},)).module()
        close(exported(images), expected)
        close(exported(images[:2]), expected[:2])


@both
def test_threads_run_the_same_model_independently(reduction):
    model, images = with_reduction(by_hand.network(), reduction()), by_hand.images(6)
    with torch.no_grad():
        expected = model(images)
    found = {}

    def work(number):
        with torch.no_grad():
            found[number] = [model(images[number : number + 1])[0] for _ in range(8)]

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, logits in enumerate(expected):
        for repeated in found[number]:
            close(repeated, logits)


@both
def test_remove_restores_the_network_and_weights_keep_their_names(reduction):
    model, images = by_hand.network("layer scale, registers"), by_hand.images()
    before, expected, keys = models.state_of(model), model(images), list(model.state_dict())
    handle = reduce_tokens(model, reduction())
    assert list(model.state_dict()) == keys
    assert type(reduction()).__name__ in repr(handle)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    found = model(images)
    assert not torch.equal(found, expected)
    handle.remove()
    handle.remove()
    models.assert_same_state(before, models.state_of(model))
    assert torch.equal(model(images), expected)
    assert all("forward" not in vars(block) for block in model.blocks)
    for copied in copies:  # remove() does not affect copies
        assert torch.equal(copied(images), found)
    reduce_tokens(model, reduction())
    assert torch.equal(model(images), found)


def test_mechanism_can_be_inserted_before_the_first_reduction():
    model, images = by_hand.network(), by_hand.images()
    inserted = insert(model, lambda channels: CBAM(channels, reduction=4), at=["blocks.0", "blocks.1"], image=images[0])
    expected = with_reduction(copy.deepcopy(model), TokenMerging([0, 0, 3, 3]))(images)
    with torch.no_grad():
        for part in inserted.places.values():
            part.gamma.fill_(0.5)
    found = with_reduction(model, TokenMerging([0, 0, 3, 3]))(images)
    assert (found - expected).abs().max() > 1e-3


# Errors -------------------------------------------------------------------------------------------------------------


def test_unsupported_networks_raise_and_stay_unchanged():
    def vit_with_parallel_blocks():
        return timm.create_model(
            "vit_tiny_patch16_224", depth=1, block_fn=timm.models.vision_transformer.ParallelScalingBlock
        )

    unsupported = {
        "in a VisionTransformer or an Eva of timm; this is a ResNet": lambda: timm.create_model("resnet10t"),
        "this is a Beit": lambda: timm.create_model("beit_base_patch16_224", depth=1),
        "this is a SwinTransformer": lambda: timm.create_model("swin_tiny_patch4_window7_224", depths=(1, 1, 1, 1)),
        "of timm; this is a VisionTransformer": lambda: torchvision.models.VisionTransformer(32, 16, 1, 1, 8, 8),
        "in block 0 of this VisionTransformer, a ParallelScalingBlock": vit_with_parallel_blocks,
        "block 0 of this VisionTransformer, whose attention is DiffAttention": lambda: timm.create_model(
            "vit_tiny_patch16_224", depth=1, num_heads=4, attn_layer="diff"
        ),
    }
    for message, make in unsupported.items():
        model = make()
        before = models.state_of(model)
        with pytest.raises(UsageError, match=message):
            reduce_tokens(model, TokenMerging(1))
        models.assert_same_state(before, models.state_of(model))


def test_wrong_rates_raise():
    for rate in (-1, [], [3, -1]):
        refuses(ValueError, "rate must be ≥ 0", TokenMerging, rate)
    refuses(ValueError, "needs a single rate", TokenMerging, [1, 2], decreasing=True)
    for keep in (0, 1.1, [], [0.5, 0]):
        refuses(ValueError, r"keep must be in \(0, 1\]", TokenPruning, keep)
    model = by_hand.network()
    before = models.state_of(model)
    for message, reduction in {
        "rate has 2 entries for 4 blocks; give one number, or one per block": TokenMerging([1, 2]),
        "keep has 3 entries for 1 blocks": TokenPruning([0.5, 0.5, 0.5], blocks=[1]),
        r"blocks must be distinct numbers from 0 to 3, got \[4\]": TokenPruning(0.5, blocks=[4]),
        r"distinct numbers from 0 to 3, got \[1, 1\]": TokenPruning(0.5, blocks=[1, 1]),
    }.items():
        refuses(UsageError, message, reduce_tokens, model, reduction)
    models.assert_same_state(before, models.state_of(model))


@both
def test_second_reduction_attention_mask_and_replaced_block_output_raise(reduction):
    model, images = with_reduction(by_hand.network(), reduction()), by_hand.images()
    with pytest.raises(
        UsageError,
        match="block 0 of this VisionTransformer are reduced already; call remove\\(\\) of that reduction first",
    ):
        reduce_tokens(model, TokenMerging(1))
    refuses(UsageError, "accepts no attention mask", model, images, is_causal=True)
    handle = model.blocks[1].register_forward_hook(lambda module, args, out: out + 0)
    refuses(UsageError, "something replaced the output of a block", model, images)
    handle.remove()
    assert model(images).isfinite().all()


def test_pooling_of_copied_tokens_raises():
    model = with_reduction(by_hand.network("mean"), merging())
    features = model.forward_features(by_hand.images())
    assert model.forward_head(features).shape == (2, 5)
    # a clone lacks the attribute with the sizes of the tokens
    with pytest.raises(UsageError, match="the patches of these tokens are unknown"):
        model.forward_head(features.clone())
