"""Test the lines and the bar that show how far a run is."""

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from tests.commands.command_line import QUICKSTART
from tests.conftest import SMALL
from tests.tasks.points import Linear, Points, points, trainer
from visionattn.cli import main
from visionattn.tasks import Classification
from visionattn.training.callbacks import progress

METRICS = r"train/loss [\d.]+, val/accuracy [\d.]+"


def run_of(bar, epochs=2):
    return trainer(max_epochs=epochs, enable_progress_bar=True, callbacks=[bar], num_sanity_val_steps=1)


def test_redirected_training_writes_a_line_an_epoch_with_the_time_left(capsys):
    run_of(progress.RunProgress()).fit(Classification(Linear()), datamodule=Points(*points()))
    first, second = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"epoch 1/2, 3/6 steps, {METRICS}, \d:\d\d left", first)
    assert re.fullmatch(rf"epoch 2/2, 6/6 steps, {METRICS}", second)


def test_redirected_long_epochs_validations_and_tests_write_lines_in_between(capsys):
    task, data = Classification(Linear()), Points(*points())
    run = run_of(progress.RunProgress(line_seconds=0), epochs=1)
    run.fit(task, datamodule=data)
    run.test(task, datamodule=data, verbose=False)
    lines = capsys.readouterr().err.splitlines()
    parts = [re.match(r"(.*) steps", line)[1] for line in lines]
    steps = [f"epoch 1/1, {step}/3" for step in (1, 2, 3)]
    validation = [f"epoch 1/1, validation {batch}/3, 3/3" for batch in (1, 2, 3)]
    assert parts == [*steps, *validation, "epoch 1/1, 3/3", "test, 1/3", "test, 2/3", "test, 3/3"]


def test_terminal_shows_a_bar_over_all_epochs(monkeypatch):
    monkeypatch.setattr(progress, "_PAUSE", 0)
    bar = progress.RunProgress()
    screen = io.StringIO()
    bar._console = Console(file=screen, force_terminal=True, width=120)
    run_of(bar).fit(Classification(Linear()), datamodule=Points(*points()))
    last = re.sub(r"\x1b\[[\d;?]*\w", "", screen.getvalue()).strip().splitlines()[-1]
    assert re.fullmatch(rf"  epoch 2/2 ━{{20}} 6/6 steps  {METRICS.replace(', ', '  ')} *", last)


def test_time_left_counts_only_the_steps_of_this_process(monkeypatch, capsys):
    clock = iter([100.0, 110.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    bar = progress.RunProgress()
    monkeypatch.setattr(bar, "get_metrics", lambda *_: {"v_num": 3, "loss": 0.25})
    bar._begin("epoch 6", 1000, first=500)  # resumed after 500 steps
    bar._show(None, None, 550, "epoch 6", at_once=True)  # 50 steps in 10 s
    assert capsys.readouterr().err == "epoch 6, 550/1,000 steps, loss 0.25, 1:30 left\n"


@pytest.mark.parametrize(
    ("flags", "shown"),
    [
        ([], True),
        (["--trainer.enable_progress_bar=false"], False),
        (["--trainer.callbacks=lightning.pytorch.callbacks.TQDMProgressBar"], False),
    ],
)
def test_command_line_shows_progress_unless_another_bar_or_none_is_chosen(flags, shown, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = [flag for flag in SMALL if "progress" not in flag]
    options = ["--data.train_size=16", "--data.val_size=8", "--data.num_workers=0", "--test_after_fit=false"]
    assert main(["fit", "--config", QUICKSTART, *small, *options, "--overlays.every_n_epochs=0", *flags]) == 0
    assert ("epoch 1/1, 1/1 steps" in capsys.readouterr().err) == shown
