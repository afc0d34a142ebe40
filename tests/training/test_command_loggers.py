"""Test that metrics and overlays go to CSV and TensorBoard, or to CSV and W&B, which is offline here."""

import csv
from pathlib import Path

import numpy as np
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import CONFIGS
from visionattn.cli import main
from visionattn.data import read_image


def test_wandb_files_with_overlays_are_in_the_run_folder(tmp_path, monkeypatch):
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
    (of_epoch,) = media.glob("overlays_*.png")
    written = read_image(run / "overlays" / "epoch_000.jpg").astype(int)
    assert np.abs(read_image(of_epoch).astype(int) - written).mean() < 3  # the file in the run is a JPEG
    (of_test,) = media.glob("test/overlays_*.png")
    np.testing.assert_array_equal(read_image(of_test), read_image(run / "overlays" / "test.png"))
    with open(run / "metrics.csv") as file:
        assert {"val/loss", "val/accuracy"} <= set(next(csv.reader(file)))
    logger = yaml.safe_load((run / "config.yaml").read_text())["trainer"]["logger"]
    assert logger["init_args"]["save_dir"] == "."  # another run with this config must not write into this run


def test_tensorboard_and_csv_get_metrics_and_overlays_by_default(quick_run):
    events = EventAccumulator(str(quick_run)).Reload()
    assert {"overlays", "test/overlays"} <= set(events.Tags()["images"])
    assert "val/accuracy" in events.Tags()["scalars"]
    with open(quick_run / "metrics.csv") as file:
        assert {"val/loss", "val/accuracy"} <= set(next(csv.reader(file)))
