"""Test overlays during training. `test_scanpath_report.py` tests their content for a glimpse network."""

from pathlib import Path

import pytest

from tests.commands.command_line import QUICKSTART, fails
from tests.conftest import SMALL
from visionattn.cli import main


def test_model_without_a_fitting_heatmap_method_is_refused_before_the_first_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model.network.attention=visionattn.attention.ECA", *SMALL]
    fails(["fit", "--config", QUICKSTART, *flags], 2, "gates over channels only", "Methods that fit", capsys=capsys)
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_overlays_and_report_are_drawn_in_every_precision(precision, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    sizes = ["--data.train_size=16", "--data.val_size=8", "--data.test_size=8", "--data.num_workers=0"]
    assert main(["fit", "--config", QUICKSTART, *SMALL, *sizes, f"--trainer.precision={precision}"]) == 0
    run = Path("runs/quickstart/0")
    assert {path.name for path in (run / "overlays").iterdir()} == {"epoch_000.jpg", "test.png"}
