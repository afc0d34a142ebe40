"""Commands and configs take models of transformers and torchvision by name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.commands.command_line import fails
from tests.models import transformers_detectors
from tests.models.transformers_folders import vit, zero_shot
from visionattn.cli import main

CONFIG = """
model:
  class_path: visionattn.tasks.Classification
  init_args:
    network:
      class_path: visionattn.models.Classifier
      init_args: {backbone: "hf:models/vit", num_classes: 5, pretrained: true}
data:
  class_path: visionattn.data.ImageFolderData
  init_args: {root: photos, preprocess: {size: 32}, batch_size: 8, num_workers: 0}
name: named
"""
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=1", "--trainer.enable_progress_bar=false"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, photo_folder):
    home = tmp_path_factory.mktemp("named")
    (home / "models").mkdir()
    vit(home / "models" / "vit")
    zero_shot(home / "models" / "clip", "clip")
    transformers_detectors.save(home / "models" / "detr", "rt_detr")
    (home / "photos").symlink_to(photo_folder)
    (home / "images").mkdir()
    picture = np.random.default_rng(0).integers(0, 256, (50, 71, 3), dtype=np.uint8)
    Image.fromarray(picture).save(home / "images" / "a.png")
    (home / "named.yaml").write_text(CONFIG)
    (home / "fixed_network_of_a_test.py").write_text(
        "from torch import nn\n"
        "def make(): return nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))\n"
    )
    return home


@pytest.fixture
def here(home, monkeypatch):
    monkeypatch.chdir(home)
    yield home
    sys.modules.pop("fixed_network_of_a_test", None)


OVERLAY = ["overlay", "--images", "images", "--out"]


@pytest.mark.parametrize(
    "model",
    [
        ["hf:models/vit"],
        ["hf:models/clip", "--classes", "a cat, a dog"],
        ["torchvision:squeezenet1_1", "--weights", "random"],
        ["fixed_network_of_a_test:make", "--size", "24", "--method", "gradcam"],
    ],
)
def test_overlays_and_pages_of_named_models(model, here, tmp_path, capsys):
    assert main([*OVERLAY, str(tmp_path / "out"), "--model", *model, "--page"]) == 0, capsys.readouterr().err
    assert (tmp_path / "out" / "index.html").exists()
    line = (tmp_path / "out" / "manifest.jsonl").read_text()
    names = {"hf:models/vit": "kind", "hf:models/clip": '"class": "a '}.get(model[0], "")
    assert names in line
    said = "is unknown; images are resized to 24 × 24 pixels and normalised with mean (0.485" in capsys.readouterr().err
    assert said == model[0].startswith("fixed")


def test_boxes_of_a_named_detector_are_exported(here, tmp_path):
    out = tmp_path / "out"
    assert main([*OVERLAY, str(out), "--model", "hf:models/detr", "--save", "overlay", "boxes", "--page"]) == 0
    (line,) = map(json.loads, (out / "manifest.jsonl").read_text().splitlines())
    assert line["method"] == "odam"
    assert line["found"][0][4].startswith("kind ")
    assert {"overlay", "boxes"} <= line["outputs"].keys()


def test_export_and_score_of_a_named_model(here, tmp_path):
    assert main(["export", "--model", "hf:models/vit", "--out", str(tmp_path / "vit.pt2")]) == 0
    score = ["score", "--data", "photos/class0", "--model", "hf:models/vit", "--method", "raw", "--images", "2"]
    assert main([*score, "--steps", "2"]) == 0


@pytest.mark.parametrize(
    ("model", "code", "parts"),
    [
        (["hf:models/clip"], 2, ['name them: --classes "a cat, a dog"']),
        (["hf:models"], 1, ["the folder models has no config.json"]),
        (["hf:nothing"], 2, ["neither a folder nor a model on the hub"]),
        (["fixed_network_of_a_test:make", "--size", "32"], 2, ["does not accept images of 32 × 32 pixels", "--size"]),
        (["hf:models/vit", "--classes", "none.txt"], 1, ["the class names in none.txt cannot be read"]),
        (["fixed_network_of_a_test:make", "--weights", "random"], 2, ["random weights (--weights random, or"]),
        (["test_vit", "--new-head"], 2, ["--new-head) needs weights (--weights)"]),
        (["hf:models/detr", "--method", "gradcam"], 2, ["a detector has no scores of the whole image"]),
        (["resnte50"], 2, ["timm has no model 'resnte50'. Nearest:", "resnet50"]),
        (["any:thing-odd"], 2, ["is not a model name", "torchvision:NAME[/WEIGHTS]"]),
    ],
)
def test_models_that_cannot_be_used_are_refused(model, code, parts, here, tmp_path, capsys):
    fails([*OVERLAY, str(tmp_path / "out"), "--model", *model], code, *parts, capsys=capsys)


def test_a_run_with_a_named_backbone_is_read_without_its_folder(here, tmp_path, capsys):
    assert main(["fit", "--config", "named.yaml", *SHORT]) == 0
    content = torch.load("runs/named/0/best.ckpt", weights_only=True)
    assert content["visionattn"]["architectures"]["hf:models/vit"]["hidden_size"] == 24
    Path("models/vit").rename("models/moved")
    try:
        assert main([*OVERLAY, str(tmp_path / "out"), "--ckpt", "runs/named/0/best.ckpt"]) == 0, capsys.readouterr().err
        assert main(["test", "--config", "runs/named/0/config.yaml", "--ckpt_path", "runs/named/0/best.ckpt"]) in (0, 1)
    finally:
        Path("models/moved").rename("models/vit")


@pytest.mark.slow
def test_a_name_on_the_hub_comes_from_the_cache(here, tmp_path):
    """A process without network: the cache folder has the files as the hub's client stores them."""
    snapshot = tmp_path / "hub" / "models--owner--tiny" / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    vit(snapshot)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text("0" * 40)
    out = tmp_path / "out"
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "visionattn", *OVERLAY, str(out), "--model", "hf:owner/tiny"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert '"class": "kind' in (out / "manifest.jsonl").read_text()
