"""The examples in docstrings run and give the documented results."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import visionattn

SHOWN = {
    name
    for _, name, _ in pkgutil.walk_packages(visionattn.__path__, "visionattn.")
    if ">>> " in Path(importlib.util.find_spec(name).origin).read_text("utf-8")
}


def test_the_public_calls_have_examples():
    assert {
        "visionattn.attention.insertion.inserting", "visionattn.capture.recording",
        "visionattn.maps.transformers.rollout", "visionattn.explorer.explorer", "visionattn.overlays.heatmaps",
    } <= SHOWN  # fmt: skip


@pytest.mark.parametrize("name", sorted(SHOWN))
def test_examples_of(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed
