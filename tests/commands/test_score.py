"""`visionattn score` prints and writes the scores of methods, and wrong calls are errors."""

import csv
import json
import re

import numpy as np
import pytest
import torch

from tests.commands.command_line import fails
from visionattn.cli import main


def test_methods_of_a_checkpoint_are_scored_on_the_test_images_of_its_config(quick_run, tmp_path, capsys):
    command = ["score", "--ckpt", str(quick_run / "best.ckpt"), "--data", str(quick_run / "config.yaml")]
    flags = ["--images", "16", "--steps", "4", "--method", "gradcam", "gate@blocks.0", "rollout"]
    assert main([*command, *flags, "--out", str(tmp_path / "scores.json")]) == 1  # rollout cannot explain this model
    printed = capsys.readouterr().out
    assert "rollout is left out: rollout needs attention over positions" in printed
    assert max(len(line) for line in printed.splitlines() if "left out" not in line and "figures:" not in line) <= 80
    lines = {line.split()[0]: line for line in printed.splitlines() if line.startswith(("gradcam ", "gate@blocks.0 "))}
    assert lines.keys() == {"gradcam", "gate@blocks.0"}
    for title in ("deletion", "insertion", "pointing", "energy", "IoU", "shuffled"):
        assert title in printed
    written = json.loads((tmp_path / "scores.json").read_text())
    assert written["paths"] == [f"digits/test/{index:06d}.png" for index in range(0, 64, 4)]  # evenly spaced
    assert written["controls"]["gate@blocks.0"] == ["random 16×16", "centre", "edges 16×16"]
    for metric in written["figures"]:
        of_images = written["of_images"][metric["name"]][metric["figure"]]
        assert len(of_images) == 16
        assert metric["value"] == pytest.approx(np.mean(of_images), abs=1e-6)
        assert metric["low"] <= metric["value"] <= metric["high"]
    of_methods = [metric for metric in written["figures"] if metric["kind"] == "method"]
    assert all(
        metric["beats_controls"] == (not metric["ties_with"] and not metric["loses_to"]) for metric in of_methods
    )
    for name, line in lines.items():
        of_method = [metric for metric in of_methods if metric["name"] == name]
        assert line.count("✗") == sum(bool(metric["loses_to"]) for metric in of_method)
        assert line.count("=") == sum(not metric["loses_to"] and bool(metric["ties_with"]) for metric in of_method)
        assert f"  {name} " in printed
    words = " ".join(printed.split())  # the verdicts are wrapped
    for name in lines:
        verdict = words.split(f" {name} ")[-1].split(" ± ")[0]
        assert re.match("(beats|ties with|loses to) ", verdict)
        for control in (metric["loses_to"] for metric in of_methods if metric["name"] == name):
            assert all(part in verdict for part in control.split(", "))


def test_methods_of_a_timm_model_are_scored_on_a_folder(photo_folder, tmp_path, capsys):
    command = ["score", "--model", "test_vit", "--weights", "random", "--data", str(photo_folder)]
    flags = ["--steps", "2", "--method", "raw", "chefer", "--images", "11", "--batch-size", "4"]
    out = tmp_path / "scores.csv"
    assert main([*command, *flags, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "pointing" not in printed
    assert "over 11 images\n" in printed  # no accuracy follows, because the folder has no labels
    with open(out) as file:
        rows = list(csv.DictReader(file))
    assert {row["figure"] for row in rows} == {"deletion", "insertion", "shuffled"}
    assert [row["name"] for row in rows if row["figure"] == "deletion"][:2] == ["raw", "chefer"]
    before = out.read_text()
    assert main([*command, *flags, "--out", str(out)]) == 0
    assert out.read_text() == before


def test_heatmaps_of_folders_stand_in_the_table_and_a_wrong_folder_is_left_out(photo_folder, tmp_path, capsys):
    for image in sorted(photo_folder.rglob("*.png")):
        file = tmp_path / "theirs" / image.relative_to(photo_folder).with_suffix(".npy")
        file.parent.mkdir(parents=True, exist_ok=True)
        np.save(file, np.random.default_rng(0).random((8, 8)))
    (tmp_path / "nothing").mkdir()
    command = ["score", "--model", "test_vit", "--weights", "random", "--data", str(photo_folder), "--steps", "2"]
    folders = [
        "--maps",
        f"theirs={tmp_path / 'theirs'}",
        "--maps",
        f"none={tmp_path / 'nothing'}",
        "--maps-span",
        "input",
    ]
    out = tmp_path / "scores.json"
    assert main([*command, "--method", "raw", "--images", "11", *folders, "--out", str(out)]) == 1
    printed = capsys.readouterr().out
    assert "none is left out: " in printed
    assert "has no heatmap of" in printed
    assert "– not measured: a folder's heatmaps" in printed
    written = json.loads(out.read_text())
    assert list(written["controls"]) == ["raw", "theirs"]
    assert written["controls"]["theirs"][0] == "random 8×8"
    assert written["of_images"]["theirs"].keys() == {"deletion", "insertion"}
    shuffled = next(row for row in written["figures"] if (row["name"], row["figure"]) == ("theirs", "shuffled"))
    assert (shuffled["value"], shuffled["beats_controls"]) == (None, None)


def test_unreadable_images_are_reported_and_the_others_scored(photo_folder, tmp_path, capsys):
    for index in range(5):
        (tmp_path / f"{index}.jpg").write_bytes(b"no image")
    command = ["score", "--model", "test_vit", "--weights", "random", "--steps", "2", "--method", "raw"]
    assert main([*command, "--data", str(tmp_path), str(photo_folder / "class0" / "0.png"), "--batch-size", "2"]) == 1
    printed = capsys.readouterr().out
    assert "0.jpg is not an image that can be read" in printed
    assert "and 2 more that cannot be read" in printed
    assert "A confidence interval needs at least 10 images; got 1," in printed
    assert "✗" not in printed
    assert "±" not in printed
    fails([*command, "--data", str(tmp_path)], 1, "there are no images to score", capsys=capsys)


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--method", "rolout"], 2, ["no method 'rolout'", "rollout"]),
        (["--method", "rollout@blocks.0"], 2, ["rollout combines all layers"]),
        (["--method", "raw@blocks.9"], 2, ["blocks.5.attn"]),
        (["--method", "gradcam@2"], 2, ["no layer '2'"]),
        (["--method", "raw@--1"], 2, ["nothing attends in '--1'"]),
        (["--maps", "raw=."], 2, ["'raw' is already the name of a method"]),
        (["--maps", "theirs=gone"], 2, ["there is no folder of heatmaps gone"]),
        (["--seed", "-1"], 2, ["seed must be in"]),
        (["--data", "digits.yaml"], 2, ["digits.yaml prepares its images differently", "--data FOLDER"]),
        (["--images", "0"], 2, ["--images must be ≥ 1"]),
        (["--steps", "0"], 2, ["--steps must be ≥ 1"]),
        (["--steps", "99999"], 2, ["steps must be in [1, 25600]"]),
        (["--out", "scores.txt"], 2, ["--out must end in .csv or .json"]),
        (["--out", "nowhere/scores.csv"], 2, ["there is no folder nowhere"]),
        (["--data", "nothing"], 2, ["there is no", "nothing"]),
        (["--data", "nothing.yaml"], 2, ["there is no config nothing.yaml"]),
        (["--data", "empty"], 1, ["there is no image in empty"]),
        (["--data", "plain.yaml"], 2, ["plain.yaml has no data section"]),
        (["--data", "broken.yaml"], 2, ["broken.yaml, line 1, column", "is not valid YAML"]),
        (["--data", "typo.yaml"], 2, ["ClutteredDigitsData has no option 'batchsize'", "batch_size"]),
        (["--data", "wrong.yaml"], 2, ["batch_size must be ≥ 1"]),
        (["--data", "gone.yaml"], 1, ["there is no folder gone"]),
    ],
)
def test_error_names_the_wrong_argument_of_score(flags, code, parts, photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    digits = "data: {class_path: visionattn.data.ClutteredDigitsData, init_args: {%s}}"
    (tmp_path / "plain.yaml").write_text("trainer: {max_epochs: 1}")
    (tmp_path / "broken.yaml").write_text("data: {")
    (tmp_path / "digits.yaml").write_text(digits % "")
    (tmp_path / "typo.yaml").write_text(digits % "batchsize: 3")
    (tmp_path / "wrong.yaml").write_text(digits % "batch_size: 0")
    (tmp_path / "gone.yaml").write_text("data: {class_path: visionattn.data.ImageFolderData, init_args: {root: gone}}")
    data = [] if "--data" in flags else ["--data", str(photo_folder)]
    command = ["score", "--model", "test_vit", "--weights", "random", *data, *flags]
    fails(command, code, *parts, capsys=capsys)


def test_error_names_the_weight_that_is_not_finite(photo_folder, tmp_path, capsys):
    import timm
    from safetensors.torch import save_file

    model = timm.create_model("test_vit")
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["norm.weight"][0] = torch.nan
    save_file(weights, tmp_path / "nan.safetensors")
    command = ["score", "--model", "test_vit", "--weights", str(tmp_path / "nan.safetensors"), "--method", "raw"]
    fails([*command, "--data", str(photo_folder)], 1, "norm.weight holds NaN", capsys=capsys)
