"""The shape of the tree: each module has its test, no import runs in a circle, and no file or folder grows without end.

`visionattn/a/b.py` is tested by `tests/a/test_b.py`, and its aspects by `tests/a/test_b_<aspect>.py`.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, TESTS = ROOT / "visionattn", ROOT / "tests"
APART = {"faults", "benchmarks", "notebooks"}
"""Folders of tests that mirror no module: kills and full disks, timings, notebooks."""
WHOLE_PROJECT = {"test_tree", "test_package", "test_readme", "test_docs", "test_malloc"}
"""Tests at the root that are of no module."""
LONGEST = 400  # lines of a file of tests
MOST = 14  # modules in a folder, and files of tests
MORE = {
    "capture": 20,  # models are watched in threads, in processes, compiled, in eager and fused attention, …
    "overlays/folder": 16,  # exports of odd images, a second time, after a kill
}
"""Folder → how many files of tests, where aspects of its modules have files of their own."""

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("_"))
FILES = sorted(path.relative_to(TESTS) for path in TESTS.rglob("*.py") if path.relative_to(TESTS).parts[0] not in APART)
FOLDERS = sorted({path.parent for path in MODULES})


def fits(name, stems):
    """Whether a name is `test_<stem>` or `test_<stem>_<aspect>` of one of the stems."""
    return any(name == f"test_{stem}" or name.startswith(f"test_{stem}_") for stem in stems)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_its_test(module):
    test = TESTS / module.parent / f"test_{module.name}"
    assert test.is_file(), f"visionattn/{module} has no test; write {test.relative_to(TESTS.parent)}"


@pytest.mark.parametrize("file", [file for file in FILES if file.name.startswith("test_")], ids=str)
def test_every_test_file_is_named_after_a_module_or_its_package(file):
    stems = {module.stem for module in MODULES if module.parent == file.parent} | {file.parent.name}
    assert fits(file.stem, stems) or (file.parent == Path() and file.stem in WHOLE_PROJECT)


def test_no_file_of_tests_is_too_long():
    lengths = {str(file): len((TESTS / file).read_text().splitlines()) for file in FILES}
    assert {file: length for file, length in lengths.items() if length > LONGEST} == {}


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_no_folder_holds_too_many_files(folder):
    modules = [path for path in (PACKAGE / folder).glob("*.py") if path.name != "__init__.py"]
    tests = list((TESTS / folder).glob("test_*.py"))
    assert len(modules) <= MOST
    assert len(tests) <= MORE.get(folder.as_posix(), MOST)


def imports_of(module):
    """The modules that a module imports, inside functions and for type checkers too; a package's face counts as the
    modules whose names are taken from it."""
    found = set()
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.Import):
            names = [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            home = ("visionattn", *module.parts[: len(module.parts) - node.level]) if node.level else ()
            names = [(".".join((*home, *filter(None, [node.module]))), alias.name) for alias in node.names]
        else:
            continue
        for package, name in names:
            path = Path(*package.split("."))
            if path.parts[0] != "visionattn":
                continue
            path = path.relative_to("visionattn")
            if (PACKAGE / path).is_dir():
                path = path / (name if name not in (face := face_of(path)) else face[name])
            found.add(path.with_suffix(".py"))
    return {path for path in found if (PACKAGE / path).is_file()} - {module}


def face_of(package):
    """The names that a package offers → the module of each."""
    stub = PACKAGE / package / "__init__.pyi"
    nodes = ast.parse(stub.read_text()).body if stub.exists() else []
    return {
        alias.name: Path(*node.module.split("."))
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def test_no_imports_run_in_a_circle():
    graph = {module: imports_of(module) for module in MODULES}
    assert sum(map(len, graph.values())) > 300  # the imports are really found
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_other_packages_are_imported_by_their_public_lists(module):
    home = module.parts[0]
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("visionattn."):
            package, *deeper = node.module.split(".")[1:]
            if package != home and (PACKAGE / package / "__init__.pyi").exists():
                names = {alias.name for alias in node.names}
                assert not deeper, f"{node.module} is private to {package}: import from visionattn.{package}"
                assert names <= face_of(Path(package)).keys(), f"put {names} into {package}/__init__.pyi"


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("drawing data.placement data.annotations overlays.outputs cli", "torch lightning albumentations"),
        ("attention capture maps evaluation", "lightning albumentations"),
        ("data", "lightning.pytorch.cli"),
    ],
)
def test_packages_load_nothing_that_they_may_not_import(modules, forbidden):
    """In a fresh process, with every module of the packages loaded: what stands behind public lists counts too."""
    code = (
        "import importlib, pkgutil, sys\n"
        f"for name in {[f'visionattn.{module}' for module in modules.split()]}:\n"
        "    home = importlib.import_module(name)\n"
        "    for info in pkgutil.walk_packages(getattr(home, '__path__', []), name + '.'):\n"
        "        importlib.import_module(info.name)\n"
        f"print(*[name for name in {forbidden.split()} if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
