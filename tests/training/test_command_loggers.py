"""Metrics and overlays go to CSV, TensorBoard and, if configured, W&B (offline here)."""

import csv
from pathlib import Path

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import CONFIGS
from visionattn.cli import main
from visionattn.data import read_image


def test_wandb_gets_metrics_and_overlays_inside_the_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sizes = ["--data.train_size=64", "--data.val_size=16", "--data.test_size=16", "--trainer.max_epochs=1"]
    arguments = ["--trainer.enable_progress_bar=false", "--trainer.logger=WandbLogger", "--trainer.logger.project=here"]
    assert main(["fit", f"--config={CONFIGS / 'quickstart.yaml'}", *sizes, *arguments]) == 0
    import wandb

    wandb.finish()
    run = Path("runs/quickstart/0")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (media,) = (run / "wandb").glob("offline-run-*/files/media/images")
    (shown,) = media.glob("overlays_*.png")
    written = read_image(run / "overlays" / "epoch_000.jpg").astype(int)
    assert np.abs(read_image(shown).astype(int) - written).mean() < 3  # one is a JPEG
    (tested,) = media.glob("test/overlays_*.png")
    np.testing.assert_array_equal(read_image(tested), read_image(run / "overlays" / "test.png"))
    with open(run / "metrics.csv") as file:
        assert {"val/loss", "val/accuracy"} <= set(next(csv.reader(file)))
    logger = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]
    assert logger["init_args"]["save_dir"] == "."  # so that the config's next run does not write into this one


def test_tensorboard_and_csv_get_metrics_and_overlays_by_default(quick_run):
    events = EventAccumulator(str(quick_run)).Reload()
    assert {"overlays", "test/overlays"} <= set(events.Tags()["images"])
    assert "val/accuracy" in events.Tags()["scalars"]
    with open(quick_run / "metrics.csv") as file:
        assert {"val/loss", "val/accuracy"} <= set(next(csv.reader(file)))
