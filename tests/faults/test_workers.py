"""Test damaged images and NaN losses in whole trainings."""

import numpy as np
import pytest
import torch
import yaml

from tests.faults.conftest import write_config


@pytest.mark.parametrize("unreadable", ["stop", "skip"])
def test_damaged_training_image_is_named_or_skipped(unreadable, server, photo_folder, tmp_path):
    config = yaml.safe_load(write_config(tmp_path).read_text())
    images = tmp_path / "images"
    for number in range(5):
        (images / f"class{number}").mkdir(parents=True)
        for index in range(4):
            content = (photo_folder / f"class{number}" / f"{index}.png").read_bytes()
            (images / f"class{number}" / f"{index}.png").write_bytes(content)
    for index in range(4):  # damage all images of the class: the split is random, and three of them are for training
        (images / "class2" / f"{index}.png").write_bytes(b"no image")
    config["model"]["init_args"]["network"]["init_args"]["num_classes"] = 5
    config["trainer"] |= {"max_epochs": 1, "limit_val_batches": 0}
    config["checkpoint"] = {"monitor": None}
    options = {"root": str(images), "num_workers": 2, "batch_size": 4, "unreadable": unreadable}
    options["preprocess"] = {"size": 40}
    config["data"] = {"class_path": "visionattn.data.ImageFolderData", "init_args": options}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(config))
    ended = server.run(["fit", "--config", tmp_path / "tiny.yaml"], tmp_path)
    assert f"{images}/class2/" in ended.output
    assert "is not an image that can be read" in ended.output
    if unreadable == "stop":
        assert ended.code == 1
        assert len(ended.output.splitlines()) == 1
    else:
        assert ended.code == 0, ended.output
        assert "3 images were left out" in ended.output


def test_nan_loss_ends_the_training_and_names_step_and_files(server, tmp_path):
    ended = server.run(["fit", "--config", write_config(tmp_path)], tmp_path, fault="record('steps'); bad_loss(8)")
    assert ended.code == 1
    assert "the loss of step 7 (epoch 1, batch 1) is nan" in ended.output
    assert "digits/train/000014.png" in ended.output
    assert "--nan_guard.on_nan skip" in ended.output
    best = torch.load(tmp_path / "runs" / "tiny" / "0" / "best.ckpt", weights_only=True)
    assert best["global_step"] == 6


def test_step_with_nan_loss_is_skipped_and_counted(server, tmp_path):
    command = ["fit", "--config", write_config(tmp_path), "--nan_guard.on_nan=skip"]
    ended = server.run(command, tmp_path, fault="bad_loss(8)")
    assert ended.code == 0, ended.output
    run = tmp_path / "runs" / "tiny" / "0"
    last = torch.load(run / "last.ckpt", weights_only=True)
    assert all(torch.isfinite(value).all() for value in last["current_model_state"].values())
    moments = next(iter(last["optimizer_states"][0]["state"].values()))
    assert moments["step"] == 11  # one of the twelve steps was skipped
    assert "train/skipped" in (run / "metrics.csv").read_text().splitlines()[0]


def test_weights_with_nan_are_never_the_best(server, tmp_path):
    """The weights become NaN after the last step of the first epoch, whose loss is finite."""
    ended = server.run(["fit", "--config", write_config(tmp_path)], tmp_path, fault="bad_weights_at(6)")
    assert ended.code == 1
    assert "val/loss" in ended.output or "the loss of step 6" in ended.output
    best = tmp_path / "runs" / "tiny" / "0" / "best.ckpt"
    assert (
        not best.exists()
        or np.isfinite(
            [float(value.float().sum()) for value in torch.load(best, weights_only=True)["state_dict"].values()]
        ).all()
    )
