"""The examples (`>>>`) in docstrings run and give the documented results."""

import doctest
import importlib
import pkgutil
from pathlib import Path

import pytest

import visionattn

MODULES_WITH_EXAMPLES = {
    name
    for _, name, _ in pkgutil.walk_packages(visionattn.__path__, "visionattn.")
    if ">>> " in Path(importlib.util.find_spec(name).origin).read_text("utf-8")
}


def test_main_public_functions_have_examples():
    assert {
        "visionattn.attention.insertion.inserting", "visionattn.capture.recording",
        "visionattn.maps.methods.rollout", "visionattn.explorer.explorer", "visionattn.overlays.heatmaps",
    } <= MODULES_WITH_EXAMPLES  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODULES_WITH_EXAMPLES))
def test_examples_of_module_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted
    assert not result.failed
