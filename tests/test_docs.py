"""The examples (`>>>`) in docstrings run and give the documented results; the API pages are made without warnings."""

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


def test_pages_of_the_public_names_are_made_without_warnings(tmp_path):
    """The same command is in CONTRIBUTING.md; pytest turns each warning into a failure."""
    import pdoc

    pdoc.render.configure(docformat="google")
    pdoc.pdoc("visionattn", output_directory=tmp_path)
    for package in (name for _, name, is_package in pkgutil.iter_modules(visionattn.__path__) if is_package):
        public = getattr(importlib.import_module(f"visionattn.{package}"), "__all__", [])
        page = (tmp_path / "visionattn" / f"{package}.html").read_text("utf-8") if public else ""
        assert [name for name in public if f'id="{name}"' not in page] == []
