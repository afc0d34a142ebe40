"""The hub, whose client is replaced by one of the same signatures that keeps its repositories in a folder."""

import json
import shutil
from pathlib import Path
from unittest import mock

import huggingface_hub
import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import visionattn as va
from tests.overlay.explored import photo
from visionattn.cli import main
from visionattn.data import read_image
from visionattn.errors import DataError, UsageError
from visionattn.training import hub
from visionattn.training.checkpoints import read


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """Where the repositories lie: `owner/name` is a folder."""
    home = tmp_path / "hub"

    def create_repo(repo_id, **options):
        (home / repo_id).mkdir(parents=True, exist_ok=options["exist_ok"])
        return f"https://huggingface.co/{repo_id}"

    def upload_folder(repo_id, folder_path, **options):
        shutil.copytree(folder_path, home / repo_id, dirs_exist_ok=True)

    def download(repo_id, filename, revision=None):
        path = home / repo_id / (revision or "") / filename
        if not path.exists():
            raise huggingface_hub.errors.EntryNotFoundError(f"404: no {filename} in {repo_id}\nmore")
        return str(path)

    api = mock.create_autospec(huggingface_hub.HfApi)
    api.return_value.create_repo.side_effect = create_repo
    api.return_value.upload_folder.side_effect = upload_folder
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        mock.create_autospec(huggingface_hub.hf_hub_download, side_effect=download),
    )
    return home


def test_what_is_pushed_is_loaded_again(quick_run, shelf, capsys):
    assert main(["push", "--ckpt", str(quick_run / "best.ckpt"), "--repo", "me/digits"]) == 0
    assert capsys.readouterr().out.strip() == "https://huggingface.co/me/digits"
    assert huggingface_hub.HfApi.return_value.create_repo.call_args.kwargs["private"] is True
    folder = shelf / "me" / "digits"
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "config.json", "README.md", "overlay.png"}
    before, after = va.load(quick_run / "best.ckpt"), va.load("hf://me/digits")
    for name, value in before.state_dict().items():
        torch.testing.assert_close(after.state_dict()[name], value, rtol=0, atol=0)
    assert (after.preprocess, after.class_names) == (before.preprocess, before.class_names)
    assert json.loads((folder / "config.json").read_text()) == json.loads(
        json.dumps(read(quick_run / "best.ckpt")["visionattn"])
    )
    np.testing.assert_array_equal(read_image(folder / "overlay.png"), read_image(quick_run / "overlays" / "test.png"))


def test_the_card_tells_the_results_and_its_commands_work(quick_run, shelf, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.push(quick_run / "best.ckpt", "me/digits", private=False)
    card = (shelf / "me" / "digits" / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["library_name"] == "visionattn"
    assert yaml.safe_load(front)["pipeline_tag"] == "image-classification"
    for name, value in hub._results(quick_run / "test.csv"):
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


def test_a_picture_of_ones_own_on_the_card(quick_run, shelf, tmp_path):
    Image.fromarray(photo()).save(tmp_path / "mine.png")
    shutil.copy(quick_run / "best.ckpt", tmp_path / "alone.ckpt")
    with pytest.raises(UsageError, match="the card shows an overlay"):
        hub.push(tmp_path / "alone.ckpt", "me/alone")
    hub.push(tmp_path / "alone.ckpt", "me/alone", picture=tmp_path / "mine.png")
    assert read_image(shelf / "me" / "alone" / "overlay.png").shape == photo().shape
    assert "on the test images" not in (shelf / "me" / "alone" / "README.md").read_text()


def test_a_revision_is_asked_for(quick_run, shelf):
    hub.push(quick_run / "best.ckpt", "me/digits")
    with pytest.raises(DataError, match="hf://me/digits@v2 could not be had from the hub: 404"):
        va.load("hf://me/digits@v2")
    assert huggingface_hub.hf_hub_download.call_args.kwargs["revision"] == "v2"
    (shelf / "me" / "digits" / "v2").mkdir()
    shutil.copy(shelf / "me" / "digits" / "model.safetensors", shelf / "me" / "digits" / "v2")
    assert hub.load("me/digits@v2").class_names == va.load(quick_run / "best.ckpt").class_names


def test_code_of_strangers_is_not_run(quick_run, shelf):
    """Neither a pickle under the weights' name, nor a class that is none of ours."""
    from safetensors.torch import load_file, save_file

    hub.push(quick_run / "best.ckpt", "me/digits")
    weights = shelf / "me" / "digits" / "model.safetensors"
    entry = read(weights)["visionattn"]
    entry["model"]["init_args"]["network"] = {"class_path": "os.system", "init_args": {"command": "touch harm"}}
    save_file(load_file(weights), weights, metadata={"visionattn": json.dumps(entry)})
    with pytest.raises(DataError, match=r"names os\.system, which is not a module of"):
        va.load("hf://me/digits")
    torch.save({"state_dict": {}, "visionattn": {}}, weights)
    with pytest.raises(DataError, match="cannot be read as a checkpoint"):
        va.load("hf://me/digits")


def test_the_hub_refuses(quick_run, shelf):
    huggingface_hub.HfApi.return_value.create_repo.side_effect = RuntimeError("401 Client Error\nlong story")
    with pytest.raises(DataError, match=r"me/digits cannot be put on the hub: 401 Client Error$"):
        hub.push(quick_run / "best.ckpt", "me/digits")
    with pytest.raises(UsageError, match="named owner/name, got 'digits'"):
        hub.push(quick_run / "best.ckpt", "digits")
    for name in ("../../etc", "../..", "a/b/c"):
        with pytest.raises(UsageError, match="named owner/name"):
            va.load(f"hf://{name}")
