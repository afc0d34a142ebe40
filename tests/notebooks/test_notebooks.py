"""The notebooks run with small settings, and the committed files are complete and up to date."""

import base64
import io
import re

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from PIL import Image

from tests.notebooks.execute import HOME, NOTEBOOKS, code, digest, execute, read, tagged, tidy
from tests.refusals import refuses

SMALL = {
    "01_soft_attention": {"train_size": 96, "test_size": 16, "epochs": 1, "look_every": 2},
    "02_glimpses": {"train_size": 128, "test_size": 16, "epochs": 1, "look_every": 1},
    "03_vision_transformers": {"train_size": 64, "test_size": 16, "epochs": 1, "look_every": 1},
    "04_detection": {"train_size": 32, "test_size": 8, "epochs": 1, "explained": 4, "min_score": 0.0},
    "05_can_i_believe_this_map": {"train_size": 64, "test_size": 12, "epochs": 1, "steps": 2, "copies": 1},
    "06_your_images_your_model": {"count": 12, "epochs": 1, "steps": 0},
}
"""Settings with which each notebook runs in seconds."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def output_text(notebook):
    """Return the text of all outputs, without pictures."""
    texts = []
    for output in outputs(notebook):
        texts += [output.get("text", ""), *output.get("traceback", ())]
        texts += [text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(map(str, texts))


def unwanted_outputs(notebook):
    """Return errors, warnings, progress bars, local paths and memory addresses among the outputs."""
    found = [f"a {output.output_type}" for output in outputs(notebook) if output.output_type == "error"]
    found += [output.text for output in outputs(notebook) if output.get("name") == "stderr"]
    text = output_text(notebook)
    found += re.findall(r"(?:/home|/root|/tmp|/usr|/opt|/work|/Users|[A-Z]:\\)[/\\]?\S*", text)
    found += re.findall(r"\bat 0x[0-9a-f]+|\S*Warning\b.*|it/s\]", text)
    return found


def test_every_notebook_has_small_settings():
    assert [path.stem for path in NOTEBOOKS] == list(SMALL)


@every_notebook
def test_notebook_runs_with_small_settings_and_leaves_no_files(path, tmp_path):
    found = execute(read(path), tmp_path, SMALL[path.stem])
    assert unwanted_outputs(found) == []
    assert list(tmp_path.iterdir()) == []
    assert any("image/png" in output.get("data", {}) for output in outputs(found))


@pytest.mark.slow
@pytest.mark.timeout(900)
@every_notebook
def test_claims_of_the_text_hold_in_a_full_run(path, tmp_path):
    found = tidy(execute(read(path), tmp_path))
    assert unwanted_outputs(found) == []
    assert list(tmp_path.iterdir()) == []


@every_notebook
def test_committed_outputs_come_from_the_committed_code(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    message = f"the code has changed since the notebook ran; run python -m tests.notebooks.execute {path.stem}"
    assert notebook.metadata.get("executed") == digest(notebook), message
    assert unwanted_outputs(notebook) == []
    assert notebook == tidy(read(path))
    (claims,) = tagged(notebook, "claims")  # has no output, so no assertion failed
    assert claims.source.count("assert ") >= 3
    assert claims.outputs == []


@every_notebook
def test_pictures_and_files_are_small_enough(path):
    assert path.stat().st_size < 1_000_000
    pictures = [
        data for output in outputs(read(path)) for kind, data in output.get("data", {}).items() if "image" in kind
    ]
    assert len(pictures) >= 3
    for data in pictures:
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert 150 <= picture.width <= 1100


@every_notebook
def test_notebook_has_its_sections_and_uses_only_public_names(path):
    notebook = read(path)
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert text.startswith(f"# {int(path.name[:2])} · ")
    assert "$$" in text or path.name.startswith("06")
    assert "**Try next**" in text
    source = "\n".join(cell.source for cell in code(notebook))
    assert not re.findall(r"(?:\bva|visionattn)(?:\.\w+)*\._\w+|import _\w+", source)
    assert not re.search(r"urlopen|requests|pretrained=True|shared/", source)


@every_notebook
def test_configs_named_in_the_text_exist(path):
    text = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "markdown")
    for name in re.findall(r"--config (\S+?\.yaml)", text):
        assert (HOME / name).is_file(), name


def test_the_cell_of_ten_lines_has_at_most_ten_lines():
    (cell,) = tagged(read(NOTEBOOKS[5]), "ten-lines")
    assert len(cell.source.splitlines()) <= 10


def test_readme_links_to_every_notebook():
    readme = (HOME / "README.md").read_text()
    assert "'.[notebooks]'" in readme
    assert "\nnotebooks = [" in (HOME / "pyproject.toml").read_text()
    for path in NOTEBOOKS:
        assert f"(notebooks/{path.name})" in readme


def test_a_failing_cell_and_an_unknown_setting_are_errors(tmp_path):
    cells = [
        nbformat.v4.new_code_cell("size = 3", metadata={"tags": ["settings"]}),
        nbformat.v4.new_code_cell("1 / size"),
    ]
    notebook = nbformat.v4.new_notebook(cells=cells)
    refuses(ValueError, r"no setting \['count'\]; it has \['size'\]", lambda: execute(notebook, tmp_path, {"count": 1}))
    refuses(CellExecutionError, "ZeroDivisionError", lambda: execute(notebook, tmp_path, {"size": 0}))
