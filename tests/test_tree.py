"""The shape of the tree: each module has a test, imports have no cycle, and files and folders have a largest size.

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
WITHOUT_MODULES = {"faults", "benchmarks", "notebooks"}
"""Folders of tests that correspond to no folder of modules: kills and full disks, timings, notebooks."""
WHOLE_PROJECT = {"test_tree", "test_package", "test_readme", "test_docs", "test_sequences"}
"""Tests in the root folder that belong to no module."""
MAX_LINES = 400  # of a test file
MAX_FILES = 14  # modules in a folder of the package, and test files in a folder of tests
MAX_TEST_FILES = {
    "capture": 20,  # one file each for threads, processes, compiled models, eager and fused attention, …
    "commands": 16,  # one file each for models by name, networks of the user's own, the checkpoints of a training, …
    "training": 16,  # one file each for changed data, loggers, several labels, a plain trainer, …
    "overlays/folder": 16,  # one file each for odd images, a second export, an export after a kill, …
}
"""Folder → largest number of test files, where single aspects of a module have a file each."""

MODULES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py") if not path.name.startswith("_"))
FILES = sorted(
    path.relative_to(TESTS) for path in TESTS.rglob("*.py") if path.relative_to(TESTS).parts[0] not in WITHOUT_MODULES
)
FOLDERS = sorted({path.parent for path in MODULES})


def fits(name, stems):
    """Return whether a name is `test_<stem>` or `test_<stem>_<aspect>` for one of the stems."""
    return any(name == f"test_{stem}" or name.startswith(f"test_{stem}_") for stem in stems)


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_every_module_has_its_test(module):
    test = TESTS / module.parent / f"test_{module.name}"
    assert test.is_file(), f"visionattn/{module} has no test; write {test.relative_to(TESTS.parent)}"


@pytest.mark.parametrize("file", [file for file in FILES if file.name.startswith("test_")], ids=str)
def test_every_test_file_is_named_after_a_module_or_its_package(file):
    stems = {module.stem for module in MODULES if module.parent == file.parent} | {file.parent.name}
    assert fits(file.stem, stems) or (file.parent == Path() and file.stem in WHOLE_PROJECT)


def test_no_test_file_is_too_long():
    lengths = {str(file): len((TESTS / file).read_text().splitlines()) for file in FILES}
    assert {file: length for file, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_no_folder_holds_too_many_files(folder):
    modules = [path for path in (PACKAGE / folder).glob("*.py") if path.name != "__init__.py"]
    tests = list((TESTS / folder).glob("test_*.py"))
    assert len(modules) <= MAX_FILES
    assert len(tests) <= MAX_TEST_FILES.get(folder.as_posix(), MAX_FILES)


def imports_of(module):
    """Return the modules that a module imports, also inside functions and under TYPE_CHECKING.

    A name that is imported from a package counts as an import of the module that defines the name.
    """
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
                path = path / public_names(path).get(name, name)
            found.add(path.with_suffix(".py"))
    return {path for path in found if (PACKAGE / path).is_file()} - {module}


def public_names(package):
    """Return name → module for the names in a package's `__init__.pyi`."""
    stub = PACKAGE / package / "__init__.pyi"
    nodes = ast.parse(stub.read_text()).body if stub.exists() else []
    return {
        alias.name: Path(*node.module.split("."))
        for node in nodes
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }


def test_imports_have_no_cycle():
    graph = {module: imports_of(module) for module in MODULES}
    assert sum(map(len, graph.values())) > 300  # `imports_of` does find imports
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the modules of the cycle


@pytest.mark.parametrize("module", MODULES, ids=str)
def test_modules_import_only_public_names_of_other_packages(module):
    home = module.parts[0]
    for node in ast.walk(ast.parse((PACKAGE / module).read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("visionattn."):
            package, *deeper = node.module.split(".")[1:]
            if package != home and (PACKAGE / package / "__init__.pyi").exists():
                names = {alias.name for alias in node.names}
                assert not deeper, f"{node.module} is private to {package}: import from visionattn.{package}"
                assert names <= public_names(Path(package)).keys(), f"put {names} into {package}/__init__.pyi"


@pytest.mark.parametrize(
    ("modules", "forbidden"),
    [
        ("drawing data.placement data.annotations overlays.outputs cli", "torch lightning albumentations"),
        ("attention capture maps evaluation", "lightning albumentations"),
        ("data", "lightning.pytorch.cli"),
    ],
)
def test_packages_do_not_import_forbidden_libraries(modules, forbidden):
    """Import every module of the packages in a new process; indirect imports count too."""
    code = (
        "import importlib, pkgutil, sys\n"
        f"for name in {[f'visionattn.{module}' for module in modules.split()]}:\n"
        "    home = importlib.import_module(name)\n"
        "    for info in pkgutil.walk_packages(getattr(home, '__path__', []), name + '.'):\n"
        "        importlib.import_module(info.name)\n"
        f"print(*[name for name in {forbidden.split()} if name in sys.modules])\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == ""
