"""`visionattn overlay`: overlays of checkpoints and timm models, the README's commands, and wrong calls."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from tests.commands.command_line import fails
from tests.conftest import CONFIGS
from tests.overlays.folder.films import film
from visionattn.cli import main
from visionattn.commands import overlay
from visionattn.data import read_image
from visionattn.files import FolderLock


def test_overlays_of_a_checkpoint_are_written_and_a_broken_image_is_reported(quick_run, tmp_path, capsys):
    from visionattn.data import ClutteredDigits

    data = ClutteredDigits("test", size=3)
    (tmp_path / "in").mkdir()
    for index in range(3):
        picture = data.read_source(data[index]["path"])
        Image.fromarray(picture).save(tmp_path / "in" / f"{index}.png")
    (tmp_path / "in" / "broken.jpg").write_bytes(b"no image")
    flags = ["--images", str(tmp_path / "in"), "--out", str(tmp_path / "out"), "--ckpt", str(quick_run / "best.ckpt")]
    assert main(["overlay", *flags]) == 1  # one image failed
    printed = capsys.readouterr().out
    assert "3 overlays" in printed
    assert "broken.jpg: is not an image that can be read" in printed
    lines = [json.loads(line) for line in (tmp_path / "out" / "manifest.jsonl").read_text().splitlines()]
    written = [line for line in lines if line["status"] == "done"]
    assert [line["class"] for line in written] == [str(line["prediction"]) for line in written]
    for line in written:
        assert read_image(tmp_path / "out" / line["outputs"]["overlay"]).shape == (64, 64, 3)
    assert main(["overlay", *flags, "--method", "gate", "--layer", "blocks.0"]) == 1
    assert "gate of blocks.0" in capsys.readouterr().out
    fails(
        ["overlay", *flags, "--method", "rollout"],
        2,
        "Methods that fit: gate, ",
        capsys=capsys,
    )


def readme_commands():
    section = (CONFIGS.parent / "visionattn/overlays/README.md").read_text()
    commands = re.findall(r"^    visionattn (overlay .*)$", section, re.M)
    return [command for command in commands if "--demo" not in command]  # test_demo.py runs this


@pytest.mark.parametrize("command", readme_commands())
def test_commands_of_the_overlays_readme_work(command, quick_run, photo_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(photo_folder / "class0", "holiday")
    for number in range(2, 12):
        Path(f"holiday/{number}.png").unlink()
    Image.open("holiday/0.png").convert("RGB").save("holiday/x.jpg")
    Path("list.csv").write_text("path,target,x0,y0,x1,y1,label\nholiday/0.png,3,5,5,20,20,thing\nholiday/1.png\n")
    film(tmp_path / "film.mp4", range(0, 200, 20))
    for name, weights in (("a", "best"), ("b", "last")):
        Path(f"runs/{name}/0").mkdir(parents=True)
        shutil.copy(quick_run / f"{weights}.ckpt", f"runs/{name}/0/best.ckpt")
    words = shlex.split(command)
    if "--model" in words:
        words[words.index("--model") + 1] = {"resnet50": "test_resnet", "vit_small_patch16_224": "test_vit"}[
            words[words.index("--model") + 1]
        ]
        words += ["--weights", "random"]
    assert main(words) == 0
    out = Path(words[words.index("--out") + 1])
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    expected = 2 if {"list.csv", "film.mp4"} & set(words) else 3
    assert len(lines) == expected
    kinds = words[words.index("--save") + 1 : words.index("--weights")] if "--save" in words else ["overlay"]
    for line in lines:
        assert line["status"] == "done"
        assert list(line["outputs"]) == kinds
        assert all((out / name).is_file() for name in line["outputs"].values())
        methods = {"--method": 3}.get("--method" if "rollout" in words else "", 2 if "--compare" in words else 1)
        assert len(line.get("explanations", [1])) == methods
    assert f"{expected} overlays" in capsys.readouterr().out
    assert main(words) == 0
    assert f"{expected} as before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--save", "overlai"], ["no kind 'overlai' to save", "Nearest: overlay"]),
        (["--save", "difference"], ["--compare A.ckpt B.ckpt"]),
        (["--save", "mask", "--method", "raw", "rollout"], ["mask holds one heatmap per image, got 2"]),
        (["--method", "raw@0", "--layer", "1"], ["not both"]),
        (["--method", "raw", "raw"], ["needs a name of its own"]),
        (["--colormap", "virdis"], ["no colormap 'virdis'", "viridis"]),
        (["--alpha", "2"], ["alpha and saturation must be in [0, 1]"]),
        (["--top", "0"], ["hottest pixels must be in (0, 1]"]),
        (["--target", "tabby"], ["there is no class 'tabby', since the classes have no names"]),
        (["--fps", "0"], ["fps must be > 0"]),
        (["--devices", "0"], ["--devices must be ≥ 1"]),
        (["--strategy", "dpp"], ["invalid choice: 'dpp'"]),
        (["--images", "nothing/*.jpg"], ["nothing matches", "quote a pattern"]),
    ],
)
def test_error_names_the_wrong_option_of_overlay(flags, parts, photo_folder, tmp_path, capsys):
    images = [] if "--images" in flags else ["--images", str(photo_folder / "class0")]
    command = ["overlay", *images, "--out", str(tmp_path / "out"), "--model", "test_vit", "--weights", "random", *flags]
    fails(command, 2, *parts, capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_second_overlay_at_once_is_refused_with_the_process_that_writes_the_folder(photo_folder, tmp_path, capsys):
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", str(tmp_path / "out")]
    command += ["--model", "test_vit", "--weights", "random"]
    with FolderLock(str(tmp_path / "out")):
        holder = f"out is being written by process {os.getpid()} on "
        fails(command, 2, holder, "choose another folder", capsys=capsys)
    assert not (tmp_path / "out").exists()


def test_overlay_writes_a_page_and_keeps_an_unchanged_one(photo_folder, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", str(out), "--model", "test_vit"]
    command += ["--weights", "random", "--method", "raw", "rollout", "--page"]
    assert main(command) == 0
    assert re.search(rf"\n  {out}/index.html   \d\.\d MB   (\d+) images\n$", capsys.readouterr().out)
    page = out / "index.html"
    pictures = json.loads(re.search(r'id="facts">(.*?)</script>', page.read_text(), re.S)[1])["pictures"]
    assert {picture["name"] for picture in pictures} == {path.name for path in (photo_folder / "class0").iterdir()}
    heatmaps = pictures[0]["heatmaps"]
    assert {heatmap["name"] for heatmap in heatmaps if not heatmap["control"]} == {"raw", "rollout"}
    before = page.stat().st_mtime_ns
    assert main(command) == 0
    assert capsys.readouterr().out.endswith(f"  {page}   as before\n")
    assert page.stat().st_mtime_ns == before
    page.write_text("mine")
    fails(command, 2, "index.html exists and is not a page of explore", capsys=capsys)
    fails([*command[:5], "--compare", "a", "b", "--page"], 2, "--page shows one model", capsys=capsys)


@pytest.mark.parametrize("flags", [[], ["--interpolation", "nearest"], ["--interpolation", "linear"]])
def test_the_interpolation_is_smooth_unless_a_flag_names_another(flags):
    options = overlay.parser("overlay").parse_args(["--demo", *flags])
    assert overlay._style(options).interpolation == (flags[-1] if flags else "smooth")


def test_compared_checkpoints_have_distinct_names(capsys):
    from visionattn.commands.overlay import _distinct_names

    assert _distinct_names(["runs/a.ckpt", "runs/b.ckpt"]) == ["a", "b"]
    assert _distinct_names(["runs/a/0/best.ckpt", "runs/b/0/best.ckpt"]) == ["a", "b"]
    assert _distinct_names(["runs/a/0/best.ckpt", "runs/b/1/best.ckpt"]) == ["a/0", "b/1"]
    fails(["overlay", "--images", ".", "--out", "x", "--compare", "a.ckpt", "a.ckpt"], 2, "with itself", capsys=capsys)


@pytest.mark.parametrize(
    ("model", "layer"), [("test_vit", "rollout, all 6 layers of attention"), ("test_resnet", "gradcam, layer")]
)
def test_overlays_of_a_timm_model_are_kept_by_a_second_run(model, layer, photo_folder, tmp_path, capsys):
    flags = ["--images", str(photo_folder / "class0"), "--out", str(tmp_path), "--model", model, "--weights", "random"]
    assert main(["overlay", *flags, "--batch-size", "5"]) == 0
    printed = capsys.readouterr().out
    assert f"heatmaps: {layer}" in printed
    assert ("gradcam did not beat every control" in printed) == (model == "test_resnet")
    assert len(list(tmp_path.glob("*.jpg"))) == 12
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert main(["overlay", *flags]) == 0
    assert "12 as before" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
