"""Captures of models of every timm family give records or a reason; `coverage.py` writes the table of all families."""

import re

import pytest
import timm
import torch

from tests.capture import coverage, models
from visionattn.capture import FullAttention, capture
from visionattn.errors import UsageError

QUICK = {  # family: (model, its options, image size, grids of its attention, whether it has windows)
    "vision_transformer": ("test_vit", {}, 160, {(10, 10)}, False),
    "eva": ("eva02_tiny_patch14_224", {"depth": 1, "img_size": 56}, 56, {(4, 4)}, False),
    "beit": (
        "beit_base_patch16_224",
        {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 64},
        64,
        {(4, 4)},
        False,
    ),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"depths": (2, 1)}, 224, {(56, 56), (28, 28)}, True),
    "swin_transformer_v2": ("swinv2_tiny_window8_256", {"depths": (2,), "img_size": 128}, 128, {(32, 32)}, True),
    "maxxvit": ("maxvit_tiny_tf_224", {"depths": (1,), "embed_dim": (32,), "stem_width": 16}, 224, {(56, 56)}, True),
    "hiera": ("hiera_tiny_224", {"stages": (1, 1, 1, 1), "img_size": (128, 128)}, 128, None, True),
    "davit": (
        "davit_tiny",
        {"depths": (1, 1), "embed_dims": (32, 64), "num_heads": (1, 2)},
        112,
        {(28, 28), (14, 14)},
        True,
    ),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 64, {(2, 2)}, False),
    "twins": ("twins_svt_small", {"depths": (2, 2, 1, 1)}, 112, None, True),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64}, 64, None, False),
    "cait": ("cait_xxs24_224", {"depth": 1, "img_size": 64}, 64, {(4, 4)}, False),
    "levit": ("levit_128s", {}, 224, None, False),
    "metaformer": ("caformer_s18", {}, 64, {(4, 4), (2, 2)}, False),
    "coat": (
        "coat_tiny",
        {"img_size": 64},
        64,
        None,
        False,
    ),  # its softmax normalises the keys over positions; no query has weights over keys
    "byobnet": ("gcresnet33ts", {}, 64, None, False),  # the context of GC blocks
}
GATES = {
    "efficientnet": ("mnasnet_small", 64),
    "regnet": ("regnety_002", 64),
    "senet": ("legacy_seresnet18", 64),
}


@pytest.mark.parametrize("family", QUICK)
def test_a_member_of_the_family_gives_rows_that_sum_to_one(family):
    member, options, size, grids, windowed = QUICK[family]
    torch.manual_seed(0)
    model = models.randomised(timm.create_model(member, **options))
    images = models.pictures(size)
    with torch.no_grad():
        expected = model(images)
        with capture(model, FullAttention()) as records:
            found = model(images)
    assert torch.equal(found, expected)
    assert records.attention
    assert records.unlabelled == {}
    for record in records.attention:
        torch.testing.assert_close(record.weights.sum(-1), torch.ones(record.weights.shape[:-1]), atol=1e-4, rtol=0)
        cells = record.keys.index_WN
        assert set(cells[cells >= 0].tolist()) == set(range(record.grid[0] * record.grid[1])), record.name
    assert any(record.windowed for record in records.attention) == windowed
    if grids is not None:
        assert {record.grid for record in records.attention} == grids


@pytest.mark.parametrize("family", GATES)
def test_a_member_of_a_family_with_gates_gives_records_of_gates(family):
    member, size = GATES[family]
    row = coverage.capture_model(family, member, timm.create_model(member), size)
    assert row.covered
    assert row.gates > 0


def test_attention_over_channels_is_reported_and_the_rest_is_recorded():
    model = models.randomised(timm.create_model("xcit_nano_12_p16_224", depth=2, cls_attn_layers=1))
    row = coverage.capture_model("xcit", "xcit_nano_12_p16_224", model, 64)
    assert row.covered
    assert row.attention == 1
    assert row.reason == "it attends over channels or learned tokens, not over positions"


def test_every_family_of_timm_is_in_the_table_or_does_not_attend():
    families = {name.removeprefix("timm.models.") for name in map(_module_of, timm.list_models())}
    known = set(coverage.MEMBERS) | coverage.NOT_ATTENDING
    assert families <= known, f"new in timm {timm.__version__}: {sorted(families - known)}"
    assert not set(coverage.MEMBERS) & coverage.NOT_ATTENDING


def _module_of(name):
    return timm.model_entrypoint(name).__module__


def test_the_table_has_every_listed_family_and_covers_nine_in_ten():
    text = coverage.TABLE.read_text()
    rows = re.findall(r"^\| (\w+) \| ", text, re.MULTILINE)
    assert set(coverage.MEMBERS) <= set(rows)
    covered, count = map(int, re.search(r"\*\*(\d+) of (\d+) timm families", text).groups())
    assert count == len(coverage.MEMBERS)
    assert covered >= 0.9 * count
    for line in text.splitlines():
        if "**not covered**" in line:
            assert len(line.partition("**not covered**: ")[2].strip(" |")) > 10, line


@pytest.mark.slow
@pytest.mark.parametrize("family", coverage.MEMBERS)
def test_every_family_gives_records_or_a_reason(family):
    row = coverage.capture_family(family)
    assert row.same
    assert row.covered or row.reason


@pytest.mark.slow
@pytest.mark.parametrize("title", coverage.OTHERS)
def test_models_of_other_libraries_give_records(title):
    row = coverage.capture_other(title)
    # torch's fast path, which rounds differently, is off during a capture
    assert row.same or title == "torchvision ViT"
    assert row.error <= 1e-4
    assert row.attention or row.gates


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(coverage.NOT_ATTENDING))
def test_families_listed_as_without_attention_have_none(family):
    member = next(name for name in timm.list_models() if _module_of(name) == f"timm.models.{family}")
    model = timm.create_model(member).eval()
    size = model.default_cfg["input_size"][-1]
    with pytest.raises(UsageError, match="nothing in this"), torch.no_grad(), capture(model):
        model(models.pictures(size, batch=1))
