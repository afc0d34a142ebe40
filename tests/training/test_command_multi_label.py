"""Test trainings on tables of labels on the command line: fit, resume, test, predict and overlays of the checkpoint."""

import csv
import json
import os
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from tests.commands.command_line import fails
from tests.data.tables.labelled import SHAPES, write_csv, write_images
from visionattn.cli import main
from visionattn.tasks import MultiLabelClassification
from visionattn.training.callbacks import sample_sheet

OFF = ["--trainer.enable_progress_bar=false", "--trainer.accelerator=cpu"]
COUNT = 240


def config(network, **data):
    """Return a config of a multi-label training on labels.csv."""
    return {
        "name": "shapes",
        "trainer": {"max_epochs": 8, "logger": False},
        "model": {
            "class_path": "visionattn.tasks.MultiLabelClassification",
            "init_args": {
                "network": {"class_path": "visionattn.models.ConvNet", "init_args": network},
                "class_weights": "balanced",
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
            },
        },
        "data": {
            "class_path": "visionattn.data.MultiLabelTableData",
            "init_args": {
                "table": "labels.csv",
                "root": "images",
                "preprocess": {"size": 32},
                "num_workers": 0,
                "test_fraction": 0.15,
                **data,
            },
        },
        "overlays": {"every_n_epochs": 0},
    }


def write_config(**options):
    network = {"num_classes": 3, "widths": [16, 32], "depth": 1}
    Path("shapes.yaml").write_text(yaml.safe_dump(config(network, **options)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished training on pictures with any of three shapes; return its folder and the labels."""
    home = tmp_path_factory.mktemp("shapes")
    (home / "images").mkdir()
    labels = write_images(home / "images", COUNT)
    rows = [[name, "|".join(chosen)] for name, chosen in labels.items()]
    write_csv(home / "labels.csv", rows, ("path", "labels"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        write_config()
        assert main(["fit", "--config=shapes.yaml", "--test_after_fit=true", *OFF]) == 0
    return home, labels


@pytest.fixture
def home(trained, tmp_path, monkeypatch):
    """A copy of the training in the current folder."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_training_finds_the_labels_of_pictures_with_several_shapes(home):
    figures = {row["figure"]: float(row["value"]) for row in table("runs/shapes/0/test.csv")}
    assert figures["map"] > 0.9
    assert figures["f1"] > 0.8
    assert {f"map/{name}" for name in SHAPES} <= figures.keys()
    assert not Path("runs/shapes/0/confusion.csv").exists()
    listed = [Path(f"runs/shapes/0/splits/{split}.txt").read_text().split() for split in ("train", "val", "test")]
    assert sum(map(len, listed)) == len(set().union(*listed)) == COUNT
    assert Path("runs/shapes/0/best.ckpt").is_file()  # chosen by val/map


def test_predictions_and_overlays_name_all_labels_above_the_threshold(home, trained, capsys):
    ckpt = "runs/shapes/0/best.ckpt"
    assert main(["predict", "--config=runs/shapes/0/config.yaml", f"--ckpt_path={ckpt}", *OFF]) == 0
    rows = table("runs/shapes/1/predictions.csv")
    assert list(rows[0]) == ["path", "labels", *SHAPES]
    for row in rows:
        assert row["labels"] == "|".join(name for name in SHAPES if float(row[name]) > 0.5)
    predicted = {Path(row["path"]).name: row for row in rows}
    assert (
        np.mean([row["labels"] == "|".join(trained[1][name]) for name, row in predicted.items()]) > 0.4
    )  # chance: 0.125

    command = ["overlay", "--images", *(f"images/{name}" for name in predicted), "--out=seen", f"--ckpt={ckpt}"]
    assert main([*command, "--caption"]) == 0
    lines = [json.loads(line) for line in Path("seen/manifest.jsonl").read_text().splitlines()]
    assert len(lines) == len(rows)
    for line in lines:
        row = predicted[Path(line["source"]).name]
        assert {name for name, _ in line["labels"]} == set(filter(None, row["labels"].split("|")))
        for name, probability in line["labels"]:
            assert probability == pytest.approx(float(row[name]), abs=1e-4)
        assert [value for _, value in line["labels"]] == sorted((value for _, value in line["labels"]), reverse=True)
        assert line["probability"] == pytest.approx(max(float(row[name]) for name in SHAPES), abs=1e-4)
    assert main(["explore", "--images", "images/000.png", "--out=seen.html", f"--ckpt={ckpt}"]) == 0
    score = ["score", f"--ckpt={ckpt}", "--data=runs/shapes/0/config.yaml", "--method=gradcam", "--images=12"]
    assert main([*score, "--steps=4", "--out=scores.json", "--batch-size=64"]) == 0
    accuracy = json.loads(Path("scores.json").read_text())["accuracy"]
    hits = [max(SHAPES, key=lambda name: float(row[name])) in trained[1][name] for name, row in predicted.items()]
    assert accuracy >= np.mean(hits) - 0.3  # of a sample of the test images: the most probable label is right


def test_sheet_of_the_test_names_the_labels_and_marks_exact_answers(home, monkeypatch):
    sheets = []
    plain = sample_sheet.sheet
    monkeypatch.setattr(sample_sheet, "sheet", lambda tiles, **options: sheets.append(tiles) or plain(tiles, **options))
    command = ["test", "--config=runs/shapes/0/config.yaml", "--ckpt_path=runs/shapes/0/best.ckpt", *OFF]
    assert main([*command, "--trainer.logger=null"]) == 0
    tiles = sheets[0][::2]
    assert any(", " in tile.caption[0] and tile.right for tile in tiles)
    for tile in tiles:
        found = set(re.findall(r"[a-z]+", tile.caption[0])) - {"no", "label"}
        true = set(tile.caption[1].removeprefix("is ").replace("has no label", "").replace(",", "").split())
        assert tile.right == (found == true)


def test_resume_in_the_middle_of_an_epoch_with_weighted_sampling_is_exact(home, monkeypatch, capsys):
    write_config(balance=1.0)
    flags = ["fit", "--config=shapes.yaml", "--trainer.max_epochs=2", "--trainer.limit_val_batches=0", *OFF]
    assert main([*flags, "--name=whole"]) == 0
    plain = MultiLabelClassification.training_step

    def terminated(task, batch, batch_idx):
        if task.global_step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(task, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(MultiLabelClassification, "training_step", terminated)
        assert main([*flags, "--name=killed"]) == 143
    resume = [*flags, "--name=killed", "--ckpt_path=last"]
    message = "in the middle of an epoch with the balance 1.0, but this run has 0.5; set 1.0 again"
    fails([*resume, "--data.balance=0.5"], 2, message, capsys=capsys)

    with open("labels.csv", "a") as file:
        file.write("000.png,\n")  # the same image again: harmless if its labels are the same
    rows = table("labels.csv")
    changed = Path("runs/killed/0/splits/train.txt").read_text().split()[0]
    others = [[row["path"], "square" if row["path"] == changed else row["labels"]] for row in rows[:-1]]
    assert [row["labels"] for row in rows if row["path"] == changed] != ["square"]
    before = Path("labels.csv").read_bytes()
    write_csv("labels.csv", others, ("path", "labels"))
    fails(resume, 1, f"1 with other labels or boxes ({changed})", "data.changed_ok: true", capsys=capsys)
    write_csv("labels.csv", [[row["path"], row["labels"]] for row in rows[:-1]], ("path", "labels"))
    assert before.startswith(Path("labels.csv").read_bytes())
    assert main(resume) == 0
    whole, resumed = (
        torch.load(f"runs/{name}/0/last.ckpt", weights_only=True)["state_dict"] for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_table_of_one_label_trains_a_classifier_with_focal_loss_and_fine_tunes_it(
    photo_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    rows = [[f"class{label}/{number}.png", f"class{label}"] for label in range(5) for number in range(12)]
    write_csv("labels.csv", rows)
    flags = [
        "--data=visionattn.data.TableData", "--data.table=labels.csv", f"--data.root={photo_folder}",
        "--data.num_workers=0", "--data.balance=0.5", "--data.preprocess=visionattn.data.Preprocess",
        "--data.preprocess.size=32", "--model=visionattn.tasks.Classification",
        "--model.network=visionattn.models.ConvNet", "--model.network.num_classes=5", "--model.network.widths=[8,8]",
        "--model.focal_gamma=2", "--trainer.max_epochs=2", "--overlays.every_n_epochs=0", *OFF,
    ]  # fmt: skip
    assert main(["fit", *flags, "--name=first"]) == 0
    assert main(["validate", *flags, "--name=first", "--ckpt_path=best"]) == 0
    assert main(["fit", *flags, "--name=first", "--ckpt_path=last", "--trainer.max_epochs=3"]) == 0
    saved = torch.load("runs/first/0/last.ckpt", weights_only=True)
    assert saved["class_names"] == [f"class{label}" for label in range(5)]
    assert saved["TableData"]["balance"] == 0.5
