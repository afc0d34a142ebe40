"""Test that configs are found from any folder, and that a run started from another run's config has its own folder."""

import shutil
from pathlib import Path

import pytest

from tests.commands.command_line import QUICKSTART, fails
from tests.conftest import SMALL
from visionattn.cli import main
from visionattn.errors import DataError


def test_config_of_the_package_is_found_from_any_folder(tmp_path, monkeypatch):
    from visionattn.training.command import find_configs

    monkeypatch.chdir(tmp_path)
    (found,) = find_configs(["--config=configs/quickstart.yaml"])
    assert Path(found.removeprefix("--config=")).read_text() == Path(QUICKSTART).read_text()


def test_error_of_a_class_keeps_its_own_message():
    from visionattn.training.command import built

    def build():
        try:
            try:
                raise OSError("[Errno -2] Name or service not known")
            except OSError as error:
                raise DataError("the weights could not be loaded; give a local file") from error
        except DataError as error:
            raise ValueError("Problem with given class_path …") from error  # as jsonargparse does

    with pytest.raises(DataError, match=r"^the weights could not be loaded; give a local file$"):
        built(build)


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--trainer.accelerator=tpu"], "torch_xla"),
        (["--trainer.devices=0"], "`Trainer(devices='0')` value is not a valid input"),
        (["--trainer.val_check_interval=1000"], "`val_check_interval` (1000) must be less than"),
        (["--checkpoint.monitor=val/acc"], "could not find the monitored key"),
    ],
)
def test_options_that_lightning_refuses_are_named_without_a_traceback(flags, part, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    sizes = ["--data.train_size=32", "--data.val_size=8", "--data.num_workers=0", "--overlays.every_n_epochs=0"]
    flags = [*SMALL, *sizes, "--trainer.accelerator=cpu", "--test_after_fit=false", *flags]
    fails(["fit", "--config", QUICKSTART, *flags], 2, "the trainer refuses its options: ", part, capsys=capsys)


def test_the_config_of_a_run_starts_a_run_that_writes_into_its_own_folder(quick_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(quick_run, "runs/quickstart/0")
    before = {path: path.read_bytes() for path in Path("runs/quickstart/0").rglob("*") if path.is_file()}
    sizes = ["--data.train_size=32", "--data.val_size=8", "--overlays.every_n_epochs=0", "--test_after_fit=false"]
    assert main(["fit", "--config=runs/quickstart/0/config.yaml", *sizes, "--trainer.logger=false"]) == 0
    assert {"best.ckpt", "last.ckpt", "config.yaml"} <= {path.name for path in Path("runs/quickstart/1").iterdir()}
    assert {path: path.read_bytes() for path in Path("runs/quickstart/0").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--model.network.num_classes=9"], 1, "the network has num_classes 9, and the data has 10 classes"),
        (["--model.network.depth=0"], 2, "depth"),
        (["--data.canvas=4"], 2, "scale must be"),
    ],
)
def test_a_refused_training_leaves_no_run_folder(flags, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    fails(["fit", "--config", QUICKSTART, "--trainer.accelerator=cpu", *flags], code, message, capsys=capsys)
    assert not list(Path("runs/quickstart").iterdir())
