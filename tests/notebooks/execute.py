"""Execute the notebooks, in full or with small settings.

    python -m tests.notebooks.execute [NAME …]       in full; writes their outputs and pictures into the files

A notebook has one cell tagged `settings`, plain assignments at its top, which a test replaces by smaller ones. Cells
tagged `claims` assert what the text says of a training that ran in full; with small settings they are left out.
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
TIMEOUT = 280  # seconds a cell may take


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tagged(notebook: NotebookNode, tag: str) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if tag in cell.metadata.get("tags", ())]


def digest(notebook: NotebookNode) -> str:
    """Of the code, all cells in order: what was executed is what stands there."""
    return hashlib.sha256("\0".join(cell.source for cell in code(notebook)).encode()).hexdigest()


def execute(notebook: NotebookNode, folder: Path, settings: Mapping[str, Any] | None = None) -> NotebookNode:
    """Run a copy from top to bottom in a fresh kernel.

    Args:
        notebook: stays as it is.
        folder: where the kernel runs; empty, and empty afterwards.
        settings: name → value, in place of those of the notebook; None runs it in full.

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
    with tempfile.TemporaryDirectory() as home:  # nothing is left in the user's folders
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(HOME), os.environ.get("PYTHONPATH")])),
            "IPYTHONDIR": home,
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",
        }
        return client.execute(env=environment)


def tidy(notebook: NotebookNode) -> NotebookNode:
    """Leave out what differs from one run to the next and shows nothing."""
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number:02d}"
        cell.metadata = {key: value for key, value in cell.metadata.items() if key == "tags"}
        outputs: list[NotebookNode] = []
        for output in cell.get("outputs", ()):
            if outputs and output.get("name") and output.get("name") == outputs[-1].get("name"):
                outputs[-1].text += output.text  # what was printed comes in as many parts as the machine was slow
                continue
            data = output.get("data", {})
            if "image/png" in data:  # Pillow offers every picture twice
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
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of their names; all by default")
    names = tuple(parser.parse_args().names)
    for path in NOTEBOOKS:
        if not names or path.name.startswith(names):
            with tempfile.TemporaryDirectory() as folder:
                nbformat.write(tidy(execute(read(path), Path(folder))), path)
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
