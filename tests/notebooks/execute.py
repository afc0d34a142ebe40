"""Execute the notebooks, in full or with small settings.

    python -m tests.notebooks.execute [NAME …]       run in full, and write outputs and pictures into the notebooks

A notebook has one cell with the tag `settings`, which consists of assignments; a test overrides them with smaller
values. Cells with the tag `claims` assert what the text claims about the full training; with small settings these cells
are left out.
"""

import argparse
import hashlib
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

HOME = Path(__file__).parents[2]
NOTEBOOKS = sorted((HOME / "notebooks").glob("*.ipynb"))
TIMEOUT = 280  # largest time of a cell, in seconds


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def digest(notebook: NotebookNode) -> str:
    """Return the hash of all code cells. A stored hash shows whether the code has changed since its execution."""
    return hashlib.sha256("\0".join(cell.source for cell in code(notebook)).encode()).hexdigest()


def execute(notebook: NotebookNode, folder: Path, settings: Mapping[str, Any] | None = None) -> NotebookNode:
    """Run a copy of a notebook from top to bottom in a new kernel, and return the copy.

    Args:
        notebook: the notebook; unchanged.
        folder: an empty folder in which the kernel runs.
        settings: name → value, overriding the notebook's settings; None runs the notebook in full.

    Raises:
        CellExecutionError: a cell raised.
        ValueError: the notebook has no such setting.
    """
    copy = nbformat.from_dict(notebook)
    if settings is not None:
        (cell,) = tagged(copy, "settings")
        names = {line.partition("=")[0].strip() for line in cell.source.splitlines() if "=" in line}
        if unknown := settings.keys() - names:
            raise ValueError(f"the notebook has no setting {sorted(unknown)}; it has {sorted(names)}")
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in settings.items())
        copy.cells = [cell for cell in copy.cells if "claims" not in cell.metadata.get("tags", ())]
    client = NotebookClient(
        copy,
        kernel_name="python3",
        timeout=TIMEOUT,
        extra_arguments=["--log-level=ERROR"],
        resources={"metadata": {"path": str(folder)}},
        record_timing=False,
    )
    with tempfile.TemporaryDirectory() as home:  # IPython writes its files here, instead of into the user's home
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")])),
            "IPYTHONDIR": home,
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        return client.execute(env=environment)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Remove data that differs from run to run and is not shown, and join printed text that came in parts."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        outputs: list[NotebookNode] = []
        for output in cell.get("outputs", ()):
            if outputs and output.get("name") and output.get("name") == outputs[-1].get("name"):
                outputs[-1].text += output.text  # on a slow machine, printed text arrives in more parts
                continue
            data = output.get("data", {})
            if "image/png" in data:  # Pillow stores every picture as PNG and as JPEG
                data.pop("image/jpeg", None)
            output.pop("transient", None)
            outputs.append(output)
        if cell.cell_type == "code":
            cell.outputs = outputs
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
        "executed": digest(notebook),
    }
    return nbformat.from_dict(notebook)


def main() -> None:
    parser = argparse.ArgumentParser(description="Execute notebooks in full and write their outputs into the files.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="first letters of file names (default: all notebooks)")
    names = tuple(parser.parse_args().names)
    for path in NOTEBOOKS:
        if not names or path.name.startswith(names):
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(tidy(execute(read(path), Path(folder))), path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
