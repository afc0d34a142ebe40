"""Test insertion into every family of timm, with the checks of `coverage.py`, which also writes COVERAGE.md."""

import re

import pytest
import timm

from tests.attention.insertion import coverage
from tests.versions import needs

QUICK = {  # family: (model, its options, image size, number of insertion points)
    "resnet": ("seresnet18", {}, 64, 4),
    "convnext": ("convnext_atto", {}, 64, 4),
    "efficientnet": ("mnasnet_small", {}, 64, 5),
    "densenet": ("densenet121", {"block_config": (2, 2, 2, 2)}, 64, 4),
    "vision_transformer": ("test_vit", {"reg_tokens": 2}, 80, 3),
    "swin_transformer": ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "img_size": 56}, 56, 2),
    "pvt_v2": ("pvt_v2_b0", {"depths": (1, 1, 1, 1)}, 64, 4),
    "mvitv2": ("mvitv2_tiny", {"img_size": 64}, 64, 4),  # blocks return tuples
    "maxxvit": ("maxvit_tiny_tf_224", {"depths": (1, 1), "embed_dim": (32, 64), "stem_width": 16}, 224, 2),
    "efficientvim": ("efficientvim_m1", {}, 128, 1),  # returns tuples whose first item is unused
    "coat": ("coat_tiny", {"img_size": 64}, 64, 4),  # returns tuples that contain an input
}

newest = needs("timm", "1.0.31", "the families in coverage.py")


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=newest if family == "efficientvim" else ()) for family in QUICK]
)
def test_mechanism_can_be_inserted_into_the_family(family):
    member, options, size, places = QUICK[family]
    row = coverage.check_model(family, member, timm.create_model(member, **options), size)
    assert row.covered, row
    assert len(row.places.split(", ")) == places


@newest
def test_every_family_of_timm_is_in_the_table():
    families = {timm.model_entrypoint(name).__module__.removeprefix("timm.models.") for name in timm.list_models()}
    assert families == set(coverage.MEMBERS), f"timm {timm.__version__}: {families ^ set(coverage.MEMBERS)}"


def test_table_has_all_families_and_covers_90_percent():
    text = coverage.TABLE.read_text()
    rows = re.findall(r"^\| (\w+) \| (\w+) \|", text, re.MULTILINE)
    assert {family: coverage.MEMBERS[family][0] for family in coverage.MEMBERS}.items() <= dict(rows).items()
    assert set(coverage.TORCHVISION) <= {member for _, member in rows}
    covered, count = map(int, re.search(r"\*\*(\d+) of (\d+) timm families", text).groups())
    assert count == len(coverage.MEMBERS)
    assert covered >= 0.9 * count
    for line in text.splitlines():
        if "**not covered**" in line:
            assert len(line.partition("**not covered**: ")[2].strip(" |")) > 10, line


@pytest.mark.slow
@pytest.mark.parametrize("family", coverage.MEMBERS)
def test_family_accepts_a_mechanism_or_the_table_gives_a_reason(family):
    row = coverage.check_family(family)
    assert row.covered or row.reason


@pytest.mark.slow
@pytest.mark.parametrize("member", coverage.TORCHVISION)
def test_torchvision_models_accept_a_mechanism(member):
    assert coverage.check_torchvision_model(member).covered
