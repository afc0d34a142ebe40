"""Reductions keep all weights, head means or rows, of all or some layers, computed in pieces of any size."""

import itertools
import math

import pytest
import timm
import torch

from tests.capture import models
from tests.capture.models import kept
from visionattn.capture import ClassRow, FullAttention, HeadMean, NoWeights, PatchRow, capture, reductions
from visionattn.capture.reductions import Call
from visionattn.capture.token_layout import Site, Tokens

close = torch.testing.assert_close


@pytest.mark.parametrize(
    ("make", "size"),
    [
        (models.vit, 64),
        (lambda: models.vit(reg_tokens=4), 64),
        (lambda: models.vit(reg_tokens=4, class_token=False, global_pool="avg"), 64),
        (models.torchvision_vit, 64),
        (models.swin, 32),
        (lambda: models.randomised(timm.create_model("pvt_v2_b0", depths=(1, 1, 1, 1))), 64),
    ],
    ids=["vit", "registers", "registers without class token", "torchvision", "swin", "pooled keys"],
)
def test_every_reduction_agrees_with_slices_of_the_full_attention(make, size):
    model, images = make(), models.pictures(size)
    full = kept(model, images, FullAttention())
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
    assert all(record.weights is None for record in kept(model, images, NoWeights()))


def test_layers_may_be_chosen_by_index_and_by_name():
    model, images = models.vit(), models.pictures()
    full = kept(model, images, FullAttention())
    chosen = kept(model, images, FullAttention(), layers=[-1, "blocks.0"])
    assert [record.weights is None for record in chosen] == [False, True, False]
    close(chosen[0].weights, full[0].weights)
    close(chosen[2].weights, full[2].weights)


def test_records_of_several_calls_are_appended_and_numbered():
    model, images = models.vit(depth=2), models.pictures()
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(images)
        model(images[:1])
    assert [record.call for record in records] == [0, 0, 1, 1]
    close(records[0].weights[:1], records[2].weights, atol=1e-6, rtol=0)
    assert records["blocks.1.attn"] is records[3]
    assert records.report().startswith("4 records of 2 calls")


TOKENS, DIM = 4, 5
WEIGHTS_PER_HEAD = TOKENS * TOKENS


def call_and_weights(shape, bias, *, fused=True):
    """Return a call of shape (images, windows, heads), its weights from a loop in float64, and its values."""
    _, windows, heads = shape
    draw = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(*shape, TOKENS, DIM, generator=draw) for _ in range(3))
    index = torch.arange(windows * TOKENS).view(windows, TOKENS)
    tokens = Tokens((windows, TOKENS), index)
    site = Site("attn", "self", heads, tokens, tokens, fused, (windows, heads), (0,) if windows > 1 else ())
    if bias == "per head":
        added = torch.randn(1, 1, heads, TOKENS, TOKENS, generator=draw).expand(*shape, TOKENS, TOKENS)
    elif bias == "per image, window and head":  # with masked keys, as in shifted windows
        added = torch.randn(*shape, TOKENS, TOKENS, generator=draw)
        added[..., 0, 2:] = -math.inf
    else:
        added = None
    expected = torch.empty(*shape, TOKENS, TOKENS, dtype=torch.float64)
    for b, w, h in itertools.product(*map(range, shape)):
        logits = 0.3 * query[b, w, h].double() @ key[b, w, h].double().T
        expected[b, w, h] = (logits if added is None else logits + added[b, w, h]).softmax(-1)
    if not fused:
        return Call(site, weights=expected.float()), expected, value
    return Call(site, query, key, value, added, 0.3), expected, value


PIECES = {  # (images, windows, heads); the limits _TOGETHER and _MOST as numbers of heads; the expected sizes of pieces
    "all at once": ((3, 5, 4), 60, 60, [(3, 5, 4)]),
    "heads split, the last piece smaller": ((1, 1, 5), 2, 2, [(1, 1, 2)] * 2 + [(1, 1, 1)]),
    "heads split, of every image and window": ((2, 2, 3), 1, 1, [(1, 1, 1)] * 12),
    "windows grouped, the last group smaller": ((2, 5, 2), 4, 9, ([(1, 2, 2)] * 2 + [(1, 1, 2)]) * 2),
    "images grouped, the last group smaller": ((5, 2, 3), 12, 99, [(2, 2, 3)] * 2 + [(1, 2, 3)]),
    "images one by one, with all their windows": ((3, 2, 3), 11, 99, [(1, 2, 3)] * 3),
    "more heads at once than fit together": ((2, 2, 2), 1, 2, [(1, 1, 2)] * 4),
    "no image": ((0, 2, 2), 8, 8, []),
}


@pytest.fixture
def pieces(request, monkeypatch):
    shape, together, most, expected = PIECES[request.param]
    monkeypatch.setattr(reductions, "_TOGETHER", together * WEIGHTS_PER_HEAD)
    monkeypatch.setattr(reductions, "_MOST", most * WEIGHTS_PER_HEAD)
    return shape, expected


@pytest.mark.parametrize("pieces", PIECES, indirect=True)
@pytest.mark.parametrize("bias", [None, "per head", "per image, window and head"])
@pytest.mark.parametrize("with_out", [False, True], ids=["weights only", "weights and output"])
def test_pieces_hold_the_weights_of_every_image_window_and_head_exactly_once(pieces, bias, with_out):
    shape, sizes = pieces
    call, expected, value = call_and_weights(shape, bias)
    out = torch.full((*shape, TOKENS, DIM), torch.nan) if with_out else None
    visits, found = torch.zeros(shape), torch.full(expected.shape, torch.nan)
    piece_sizes = []
    for piece, part in call.pieces(out):
        piece_sizes.append(tuple(part.shape[:3]))
        visits[piece] += 1
        found[piece] = part  # the next piece overwrites the buffer
    assert piece_sizes == sizes
    assert (visits == 1).all()
    close(found.double(), expected, atol=1e-6, rtol=0)
    if with_out:
        close(out.double(), expected @ value.double(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pieces", PIECES, indirect=True)
@pytest.mark.parametrize("fused", [True, False])
def test_reductions_do_not_depend_on_the_pieces(pieces, fused):
    call, expected, _ = call_and_weights(pieces[0], "per image, window and head", fused=fused)
    close(HeadMean()(call).double(), expected.mean(2), atol=1e-6, rtol=0)
    # the call has no class token, so ClassRow keeps the mean of the patches' rows
    close(ClassRow()(call).double(), expected.mean(3), atol=1e-6, rtol=0)


@pytest.mark.parametrize("family", ["vit without class token", "swin"])
@pytest.mark.parametrize("heads", [1, 5, 9])
def test_small_pieces_give_the_same_weights_and_outputs_of_whole_models(family, heads, monkeypatch):
    model = models.swin() if family == "swin" else models.vit(class_token=False, global_pool="avg")
    images = models.pictures(32 if family == "swin" else 64, batch=3)
    full = kept(model, images, FullAttention())
    with torch.no_grad():
        expected = model(images)
    monkeypatch.setattr(reductions, "_TOGETHER", heads * 16 * 16)
    monkeypatch.setattr(reductions, "_MOST", 2 * 16 * 16)
    for reduction, axis in ((HeadMean(), 2), (ClassRow(), 3)):
        with torch.no_grad(), capture(model, reduction) as records:
            close(model(images), expected, atol=1e-5, rtol=1e-5)
        for record, reference in zip(records, full, strict=True):
            close(record.weights, reference.weights.mean(axis), atol=1e-6, rtol=0)
