"""Test that a training logs, draws and saves adaptive spans."""

import csv
from pathlib import Path

import cv2
import pytest

from tests.conftest import CONFIGS
from visionattn.attention import mean_span, spans
from visionattn.cli import main
from visionattn.training import load


def test_run_logs_draws_and_saves_its_spans(photo_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = ["fit", *(f"--config={CONFIGS}/vit/{name}.yaml" for name in ("dense", "adaptive_span"))]
    command += [f"--data.root={photo_folder}", "--data.num_workers=0", "--data.batch_size=4"]
    command += ["--model.network.num_classes=5", "--model.network.options.depth=2", "--test_after_fit=false"]
    command += ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]
    command += ["--model.span_penalty=10", "--overlays.every_n_epochs=0", "--trainer.enable_progress_bar=false"]
    assert main(command) == 0
    run = Path("runs/vit-adaptive_span/0")
    network = load(run / "best.ckpt").network
    with open(run / "metrics.csv") as file:
        logged = {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}
    found = {
        f"span/{name}.{head}": z for name, heads in spans(network).items() for head, z in enumerate(heads.tolist())
    }
    assert len(found) == 6
    assert {name: logged[name] for name in found} == pytest.approx(found, abs=1e-5)
    assert logged["span/mean"] == pytest.approx(mean_span(network).item(), abs=1e-5)
    assert logged["span/mean"] < 7.5  # the initial span; the penalty makes spans smaller
    assert cv2.imread(str(run / "overlays" / "spans.png")) is not None
