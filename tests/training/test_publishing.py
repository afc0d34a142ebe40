"""Test the files uploaded to the hub. The fixture `shelf` replaces the hub's client by one that uses local folders."""

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from PIL import Image

import visionattn as va
from tests.explorer.explored import photo
from tests.refusals import refuses
from visionattn.cli import main
from visionattn.data import read_image
from visionattn.errors import DataError, UsageError
from visionattn.training import publishing


def test_model_card_has_the_results_and_its_commands_work(quick_run, shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    publishing.push(quick_run / "best.ckpt", "me/digits", private=False)
    card = (shelf / "me" / "digits" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "visionattn"
    assert yaml.safe_load(front)["pipeline_tag"] == "image-classification"
    for name, value in publishing._results(quick_run / "test.csv"):
        assert f"| {name} | {value:.4g} |" in body
    assert "overlay.png" in body
    assert "`ConvNet` with `CBAM`" in body
    Image.fromarray(photo()).save("photo.jpg")
    Path("photos").mkdir()
    Image.fromarray(photo()).save("photos/photo.jpg")
    python = body.split("```python\n")[1].split("```")[0]
    exec(python, {})
    (command,) = [line.split()[1:] for line in body.splitlines() if line.startswith("    visionattn ")]
    assert main(command) == 0
    assert Path("seen/photo.jpg.overlay.jpg").exists()


def test_model_card_shows_an_overlay_of_a_given_picture(quick_run, shelf, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "mine.png")
    shutil.copy(quick_run / "best.ckpt", tmp_path / "alone.ckpt")  # without the run's test.csv and overlays
    refuses(UsageError, "the card needs an overlay", lambda: publishing.push(tmp_path / "alone.ckpt", "me/alone"))
    publishing.push(tmp_path / "alone.ckpt", "me/alone", picture=tmp_path / "mine.png")
    assert read_image(shelf / "me" / "alone" / "overlay.png").shape == photo().shape
    assert "on the test images" not in (shelf / "me" / "alone" / "README.md").read_text()


def test_errors_of_the_hub_and_malformed_model_names_give_messages_of_one_line(quick_run, shelf):
    huggingface_hub.HfApi.return_value.create_repo.side_effect = RuntimeError("401 Client Error\nlong story")
    with pytest.raises(DataError, match=r"me/digits cannot be uploaded to the hub: 401 Client Error$"):
        publishing.push(quick_run / "best.ckpt", "me/digits")
    refuses(UsageError, "named owner/name, got 'digits'", lambda: publishing.push(quick_run / "best.ckpt", "digits"))
    for name in ("../../etc", "../..", "a/b/c"):
        with pytest.raises(UsageError, match="named owner/name"):
            va.load(f"hf://{name}")
