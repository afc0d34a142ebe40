"""Maps of networks that merge or prune tokens, compared with the same reductions by hand, image by image."""

import functools

import pytest
import torch

from tests.attention.self_attention import tokens_by_hand as by_hand
from tests.capture import models
from tests.capture.models import kept
from visionattn.attention import TokenMerging, TokenPruning, reduce_tokens
from visionattn.capture import ClassRow, FullAttention, PatchRow, capture
from visionattn.errors import MapWarning
from visionattn.maps import EigenCAM, GradCAM, RawAttention, Rollout, ScoreCAM

close = torch.testing.assert_close

RATES = (3, 2, 6, 5)
CELLS = 24


@functools.cache
@torch.no_grad()
def reduced_by_hand(kind, fuse=None):
    """Run three images with merging (`fuse` is None) or pruning by hand; return the tokens and attention of each."""
    model = by_hand.network(kind)
    reduce = by_hand.merge(model, RATES) if fuse is None else by_hand.prune(model, {0: 0.7, 2: 0.6}, fuse=fuse)
    return [by_hand.run(model, image, reduce) for image in by_hand.images(3)]


def merged(kind="class token"):
    model = by_hand.network(kind)
    reduce_tokens(model, TokenMerging(RATES))
    return model, by_hand.images(3), reduced_by_hand(kind)


def pruned(fuse=True):
    model = by_hand.network()
    reduce_tokens(model, TokenPruning([0.7, 0.6], blocks=[0, 2], fuse=fuse))
    return model, by_hand.images(3), reduced_by_hand("class token", fuse)


def spread(row, tokens):
    """Undo the merges by dividing a token's value evenly among its patches: (N,) → (24,)."""
    cells = torch.zeros(CELLS, dtype=torch.float64)
    for value, token in zip(row, tokens, strict=True):
        for patch in token.patches:
            cells[patch] += value / len(token.patches)
    return cells


@pytest.mark.parametrize("kind", ["class token", "mean", "rotary, registers"])
def test_each_patch_has_the_cell_of_the_token_it_was_merged_into(kind):
    model, images, references = merged(kind)
    records = kept(model, images, FullAttention())
    assert len(records) == 4
    for layer, record in enumerate(records):
        assert record.grid == (4, 6)
        assert record.num_prefix_tokens == model.num_prefix_tokens
        for b, reference in enumerate(references):
            tokens = reference.tokens[layer]
            assert record.weights.shape[-1] == len(tokens)
            close(record.weights[b, 0].double(), reference.attention[layer], atol=1e-5, rtol=0)
            for number, token in enumerate(tokens):
                cells = [c for c in range(CELLS) if record.keys.of_cell(c, 3)[b, 0, number]]
                assert cells == sorted(token.patches)
                assert int(record.keys.images(3)[b, 0, number]) == (-1 if token.place is None else token.place)
    assert len({tuple(home.tolist()) for home in records[-1].keys.home_BG}) == 3  # each image has its own merges
    assert records[0].keys.home_BG is None


def test_raw_attention_of_a_merged_token_is_divided_evenly_among_its_patches():
    model, images, references = merged()
    for layer in range(4):
        raw = RawAttention(layer)(model, images).raw
        for b, reference in enumerate(references):
            expected = spread(reference.attention[layer].mean(0)[0], reference.tokens[layer])
            close(raw[b].flatten().double(), expected, atol=1e-5, rtol=0)
            close(expected.sum(), reference.attention[layer].mean(0)[0, 1:].sum())
            assert (expected > 0).all()  # every cell has a share


@pytest.mark.parametrize("kind", ["class token", "mean"])
def test_rollout_is_the_product_of_attention_and_merges(kind):
    """Compute Â_L M_{L−1} … M_1 Â_1, where row i of M holds the shares of the tokens that were merged into token i."""
    model, images, references = merged(kind)
    raw = Rollout()(model, images).raw
    first = model.num_prefix_tokens
    for b, reference in enumerate(references):
        tokens = reference.tokens[-1]
        row = torch.zeros(len(tokens), dtype=torch.float64)
        if first:
            row[0] = 1
        else:  # the head takes the mean over all patches
            row += torch.tensor([len(token.patches) / CELLS for token in tokens])
        for layer in reversed(range(4)):
            attention = reference.attention[layer].mean(0)
            row = 0.5 * row + 0.5 * row @ attention
            if layer:
                before, after = reference.tokens[layer - 1], reference.tokens[layer]
                merge = torch.zeros(len(after), len(before), dtype=torch.float64)
                merge[:first, :first] = torch.eye(first)
                for i, token in enumerate(after):
                    for j, part in enumerate(before):
                        if part.patches and set(part.patches) <= set(token.patches):
                            merge[i, j] = part.size / token.size
                close(merge.sum(1), torch.ones(len(after), dtype=torch.float64))
                row = row @ merge
        close(raw[b].flatten().double(), row[first:], atol=1e-6, rtol=0)


def test_a_merged_patch_has_the_row_of_its_token():
    model, images, references = merged()
    for cell in range(0, CELLS, 5):
        rows = kept(model, images, PatchRow(*divmod(cell, 6)))[3].weights[:, 0]
        for b, reference in enumerate(references):
            number = next(i for i, token in enumerate(reference.tokens[3]) if cell in token.patches)
            close(rows[b].double(), reference.attention[3][:, number], atol=1e-5, rtol=0)


def test_each_patch_has_the_features_of_its_merged_token():
    """EigenCAM has one value for each token, so all patches of a token must have the same value."""
    model, images, references = merged()
    outputs = []
    handle = model.blocks[2].register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    found = EigenCAM("blocks.2")(model, images)
    handle.remove()
    for b, reference in enumerate(references):
        groups = [token.patches for token in reference.tokens[3]]
        flat = found.raw[b].flatten()
        for patches in groups:
            assert len({round(float(flat[p]), 6) for p in patches}) <= 1
    assert len(found.raw[0].unique()) == len(outputs[0][0]) - 1


@pytest.mark.parametrize("reduction", [TokenMerging(9), TokenPruning(0.9)], ids=repr)
def test_high_norm_tokens_are_found_among_the_remaining_tokens(reduction):
    """Only image 1 gets a token of a large norm; the surveys of single images must not count as images."""
    model = by_hand.network(img_size=(64, 72), depth=2)  # 8 × 9 patches
    reduce_tokens(model, reduction)
    images = torch.randn(3, 3, 64, 72, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert RawAttention()(model, images).raw.shape == (3, 8, 9)

    def lengthen(module, args, out):
        if len(out) < 3:  # a survey of one image
            return None
        lengthened = out.clone()
        lengthened[1, 7] *= 1000
        vars(lengthened).update(vars(out))
        return lengthened

    model.blocks[1].register_forward_hook(lengthen)
    with pytest.warns(MapWarning, match="in 1 of 3 images"):
        RawAttention()(model, images)


METHODS = {
    "raw": RawAttention,
    "rollout": Rollout,
    "gradcam": lambda: GradCAM("blocks.2"),
    "eigencam": lambda: EigenCAM("blocks.2"),
    "scorecam": lambda: ScoreCAM("blocks.2"),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("make", [merged, pruned])
def test_the_maps_of_a_batch_equal_the_maps_of_its_images(name, make):
    model, images, _ = make()
    together = METHODS[name]()(model, images, target=3)
    assert together.raw.shape == (3, 4, 6)
    for image, raw in zip(images, together.raw, strict=True):
        close(METHODS[name]()(model, image[None], target=3).raw[0], raw, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("fuse", [True, False])
def test_pruned_tokens_are_zero_and_remaining_tokens_keep_their_positions(fuse):
    model, images, references = pruned(fuse)
    last = kept(model, images, ClassRow())[-1]
    assert last.num_prefix_tokens == 1
    raw = RawAttention()(model, images).raw
    for b, reference in enumerate(references):
        places = [-1 if token.place is None else token.place for token in reference.tokens[3]]
        assert last.keys.images(3)[b, 0].tolist() == places
        close(
            raw[b].flatten().double(), spread(reference.attention[3].mean(0)[0], reference.tokens[3]), atol=1e-5, rtol=0
        )
    assert last.keys.home_BG is None


@pytest.mark.parametrize("make", [merged, pruned])
def test_methods_leave_the_output_and_the_network_unchanged(make):
    model, images, _ = make()
    before = models.state_of(model)
    with torch.no_grad():
        expected = model(images)
        with capture(model, FullAttention()) as records:
            assert torch.equal(model(images), expected)
    models.assert_same_state(before, models.state_of(model))
    assert [record.name for record in records] == [f"blocks.{i}.attn" for i in range(4)]  # one record per block
    assert not records.unlabelled
    assert not records.missed
