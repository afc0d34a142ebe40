"""A resume refuses other images than those of the checkpoint, and a test says which images were trained on."""

import csv
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from tests.commands.command_line import fails
from tests.conftest import CONFIGS
from visionattn.cli import main
from visionattn.data import ImageFolderData
from visionattn.tasks import Classification

FLAGS = [
    f"--config={CONFIGS / 'folder.yaml'}", "--data.num_workers=0", "--data.batch_size=4", "--data.test_fraction=0.2",
    "--data.preprocess=visionattn.data.Preprocess", "--data.preprocess.size=32", "--overlays.every_n_epochs=0",
    "--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu", "--model.network.widths=[4,4]",
    "--resume.every_n_steps=1", "--report.num_images=1",
    "--trainer.max_epochs=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def stopped(photo_folder, tmp_path_factory):
    """A run that stopped in the middle of the second epoch, and a copy of its images."""
    home = tmp_path_factory.mktemp("stopped")
    shutil.copytree(photo_folder, home / "photos")
    plain = Classification.training_step

    def terminated(task, batch, batch_idx):
        if task.global_step == 13:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(task, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setattr(Classification, "training_step", terminated)
        assert main(["fit", *FLAGS, "--data.root=photos"]) == 143
    return home


@pytest.fixture
def home(stopped, tmp_path, monkeypatch):
    """A copy of the run, in which a test can change the images."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def split(name):
    """Return the images of a split of the run."""
    return [Path("photos") / line for line in Path(f"runs/folder/0/splits/{name}.txt").read_text().splitlines()]


def test_a_resume_with_other_images_is_refused_unless_allowed(home, capsys):
    resume = ["fit", *FLAGS, "--data.root=photos", "--ckpt_path=last"]
    lists = {name: split(name) for name in ("train", "val", "test")}
    first, second, third = lists["train"][:3]
    before = Path("runs/folder/0/last.ckpt").read_bytes()
    first.unlink()
    second.rename("photos/class4/moved.png")
    third.write_bytes(third.read_bytes() + b"changed")
    names = [str(path.relative_to("photos")) for path in (first, second, third)]
    parts = [
        "2 removed",
        "1 added (class4/moved.png)",
        f"1 with another file size ({names[2]})",
        "data.changed_ok: true",
    ]
    message = fails(resume, 1, *parts, *names, capsys=capsys)
    assert Path("runs/folder/0/last.ckpt").read_bytes() == before
    assert lists["train"] == split("train")
    assert main([*resume, "--data.changed_ok=true"]) == 0
    assert message.split(";")[0].removeprefix("error: ") in capsys.readouterr().err
    with open("runs/folder/0/metrics.csv") as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"0", "1"}
    assert set(split("train")) == {path for path in lists["train"] if path.exists()} | {Path("photos/class4/moved.png")}
    assert main(resume) == 0  # the new checkpoint holds the present images


def test_the_same_images_in_another_folder_are_accepted(home, capsys):
    resume = ["fit", *FLAGS, "--ckpt_path=last"]
    Path("photos").rename("elsewhere")
    saved = torch.load("runs/folder/0/last.ckpt", weights_only=True)["ImageFolderData"]["splits"]
    assert saved.keys() == {"train", "val"}
    assert main([*resume, "--data.root=elsewhere"]) == 0
    assert "differ" not in capsys.readouterr().err


def test_a_test_says_how_many_of_its_images_were_trained_on(home, capsys):
    checkpoint = ["--ckpt_path=runs/folder/0/last.ckpt", "--data.root=photos"]
    count = len(split("test"))
    assert main(["test", *FLAGS, *checkpoint]) == 0
    assert f"the checkpoint was trained on 0 of the {count} test images\n" in capsys.readouterr().err
    assert main(["test", *FLAGS, *checkpoint, "--data.seed=1", "--data.test_fraction=0.4"]) == 0
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if "trained on" in line]
    tested = {path for path, _ in ImageFolderData("photos", seed=1, test_fraction=0.4)._files["test"]}
    assert line == f"the checkpoint was trained on {len(tested & set(split('train')))} of the {len(tested)} test images"
    assert tested & set(split("train"))
    assert main(["validate", *FLAGS, *checkpoint]) == 0
    assert f"trained on 0 of the {len(split('val'))} validation images" in capsys.readouterr().err
