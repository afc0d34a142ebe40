"""Processes that load images and die, hang or fail; and losses that are no numbers."""

import os
import signal
import time

import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import Dataset

from tests.faults.conftest import tiny
from visionattn.data.pipeline import collate
from visionattn.data.workers import Loader
from visionattn.errors import DataError

BAD = 7


class Spoiled(Dataset):
    """Twenty samples, of which one is trouble."""

    def __init__(self, trouble):
        self.trouble = trouble

    def __len__(self):
        return 20

    def path_of(self, index):
        return f"images/{index:02d}.jpg"

    def __getitem__(self, index):
        if index == BAD:
            self.trouble()
        return {"image": torch.zeros(1), "path": self.path_of(index)}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(600)


def fail():
    raise KeyError("no such tag")


def unreadable():
    raise DataError("images/07.jpg: cut short")


TROUBLES = {die: "the process that read it died", hang: "not read within 1 seconds", fail: "KeyError: 'no such tag'"}
TROUBLES |= {unreadable: "cut short"}


def loader(trouble, workers, **options):
    return Loader(Spoiled(trouble), collate=collate, batch_size=4, num_workers=workers, patience=1, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_the_run_ends_soon_and_names_the_file(trouble, workers):
    if not workers and trouble in (die, hang):
        return  # in this very process: nothing is left that could tell
    started = time.monotonic()
    with pytest.raises(DataError, match=r"images/07\.jpg") as told:
        list(loader(trouble, workers))
    assert TROUBLES[trouble] in str(told.value)
    assert "\n" not in str(told.value)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_or_it_goes_on_without_that_file_and_counts_it(trouble, workers, capsys):
    if not workers and trouble in (die, hang):
        return
    skipped = {}
    batches = loader(trouble, workers, unreadable="skip", skipped=skipped, persistent_workers=workers > 0)
    for _ in range(2):  # the second epoch meets it again
        seen = [path for batch in batches for path in batch["path"]]
        assert seen == [f"images/{index:02d}.jpg" for index in range(20) if index != BAD]
    assert list(skipped) == ["images/07.jpg"]
    assert TROUBLES[trouble] in skipped["images/07.jpg"]
    assert capsys.readouterr().err.count("left out: images/07.jpg") == 1


def test_in_training_another_image_of_the_batch_stands_in():
    batches = list(loader(fail, 0, unreadable="skip", fill=True))
    assert [len(batch["path"]) for batch in batches] == [4] * 5
    assert batches[1]["path"] == ["images/04.jpg", "images/05.jpg", "images/06.jpg", "images/04.jpg"]


def test_a_slow_image_is_waited_for():
    assert sum(len(batch["path"]) for batch in loader(lambda: time.sleep(0.5), 2)) == 20


@pytest.mark.parametrize("unreadable", ["stop", "skip"])
def test_a_damaged_file_among_the_training_images(unreadable, server, photo_folder, tmp_path):
    config = yaml.safe_load(tiny(tmp_path).read_text())
    images = tmp_path / "images"
    for number in range(5):
        (images / f"class{number}").mkdir(parents=True)
        for index in range(4):
            content = (photo_folder / f"class{number}" / f"{index}.png").read_bytes()
            (images / f"class{number}" / f"{index}.png").write_bytes(content)
    for index in range(4):  # whichever of them is drawn for training
        (images / "class2" / f"{index}.png").write_bytes(b"no image")
    config["model"]["init_args"]["network"]["init_args"]["num_classes"] = 5
    config["trainer"] |= {"max_epochs": 1, "limit_val_batches": 0}
    config["checkpoint"] = {"monitor": None}
    options = {"root": str(images), "num_workers": 2, "batch_size": 4, "unreadable": unreadable}
    options["preprocess"] = {"size": 40}
    config["data"] = {"class_path": "visionattn.data.ImageFolderData", "init_args": options}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    ended = server.run(["fit", "--config", tmp_path / "tiny.yaml"], tmp_path)
    assert f"{images}/class2/" in ended.told
    assert "is no image that can be read" in ended.told
    if unreadable == "stop":
        assert ended.code == 1
        assert len(ended.told.splitlines()) == 1
    else:
        assert ended.code == 0, ended.told
        assert "3 images were left out" in ended.told


# losses that are no numbers -------------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_training_and_names_step_and_files(server, tmp_path):
    ended = server.run(["fit", "--config", tiny(tmp_path)], tmp_path, fault="record('steps'); bad_loss(8)")
    assert ended.code == 1
    assert "the loss of step 7 (epoch 1, batch 1) is nan" in ended.told
    assert "digits/train/000014.png" in ended.told
    assert "--finite_loss.otherwise skip" in ended.told
    best = torch.load(tmp_path / "runs" / "tiny" / "0" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 6


def test_or_its_step_is_skipped_and_counted(server, tmp_path):
    command = ["fit", "--config", tiny(tmp_path), "--finite_loss.otherwise=skip"]
    ended = server.run(command, tmp_path, fault="bad_loss(8)")
    assert ended.code == 0, ended.told
    run = tmp_path / "runs" / "tiny" / "0"
    last = torch.load(run / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in last["current_model_state"].values())
    moments = next(iter(last["optimizer_states"][0]["state"].values()))
    assert moments["step"] == 11  # of twelve
    assert "train/skipped" in (run / "metrics.csv").read_text().splitlines()[0]


def test_weights_that_are_no_numbers_are_never_the_best(server, tmp_path):
    """They come from the last step of an epoch, whose own loss was fine."""
    ended = server.run(["fit", "--config", tiny(tmp_path)], tmp_path, fault="bad_weights_at(6)")
    assert ended.code == 1
    assert "val/loss" in ended.told or "the loss of step 6" in ended.told
    best = tmp_path / "runs" / "tiny" / "0" / "best.ckpt"
    assert (
        not best.exists()
        or np.isfinite(
            [float(value.float().sum()) for value in torch.load(best, weights_only=True)["state_dict"].values()]
        ).all()
    )
