"""`visionattn overlay --demo`: overlays of photographs, without a network; files of the user are kept."""

import contextlib
import json
import os
import socket
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
from PIL import Image

from tests.commands.command_line import fails
from tests.refusals import refuses
from visionattn.cli import main
from visionattn.commands.demo import write_photographs
from visionattn.data import read_image, sample_photographs
from visionattn.errors import DataError
from visionattn.overlays import Summary

NAMES = ["chelsea.jpg", "coffee.jpg", "china.jpg", "flower.jpg"]


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_demo_writes_overlays_of_photographs_without_a_network(here, monkeypatch, capsys):
    def refuse(*arguments):
        raise AssertionError("the demo opens a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    assert main(["overlay", "--demo"]) == 0
    assert "4 overlays   visionattn-demo/" in capsys.readouterr().out
    out = here / "visionattn-demo"
    assert os.listdir(here) == ["visionattn-demo"]
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]
    assert {Path(line["source"]).name: line["class"] for line in lines} == dict(
        zip(NAMES, ["tiger cat", "espresso", "palace", "daisy"], strict=True)
    )
    for source in sample_photographs():
        overlay = read_image(out / f"{Path(source).name}.overlay.jpg")
        assert overlay.shape == read_image(source).shape
        assert (out / "photographs" / Path(source).name).read_bytes() == Path(source).read_bytes()
    assert "CC0" in (out / "photographs" / "SOURCES.md").read_text()
    assert main(["overlay", "--demo"]) == 0
    assert "4 as before" in capsys.readouterr().out


def test_demo_takes_the_options_of_overlay(here):
    flags = ["--method", "gradcam", "layercam", "--out", "mine", "--format", "png"]
    assert main(["overlay", *flags, "--demo"]) == 0
    with Image.open(here / "mine" / "china.jpg.overlay.png") as sheet:
        assert sheet.width > 640


def test_demo_keeps_files_of_the_user(here, capsys):
    own = here / "visionattn-demo" / "photographs" / "china.jpg"
    own.parent.mkdir(parents=True)
    own.write_text("mine")
    fails(["overlay", "--demo"], 2, "china.jpg is not a file of the demo", "another folder by --out", capsys=capsys)
    assert own.read_text() == "mine"
    assert os.listdir(own.parent) == ["china.jpg"]
    overlay = here / "other" / "china.jpg.overlay.jpg"
    overlay.parent.mkdir()
    overlay.write_text("mine")
    fails(["overlay", "--demo", "--out", "other"], 2, "china.jpg.overlay.jpg", capsys=capsys)
    assert overlay.read_text() == "mine"


def test_demo_without_the_extra_names_it_and_writes_nothing(here, monkeypatch, capsys):
    monkeypatch.setattr(metadata, "distribution", lambda name: metadata.Distribution.from_name("no-such-package"))
    fails(["overlay", "--demo"], 2, "python -m pip install 'visionattn[photos]'", capsys=capsys)
    assert os.listdir(here) == []


def test_a_folder_that_cannot_be_made_is_named(here, capsys):
    (here / "mine").write_text("a file")
    message = "the folder mine/photographs cannot be made: Not a directory"
    refuses(DataError, message, write_photographs, "mine/photographs")


def test_only_the_first_process_writes_the_photographs(here, monkeypatch):
    """Two processes would write through the same temporary files."""
    exported = []
    others = SimpleNamespace(rank=1)
    monkeypatch.setattr("visionattn.commands.overlay._processes", lambda *given: contextlib.nullcontext(others))
    monkeypatch.setattr(
        "visionattn.overlays.export", lambda images, *given, **options: exported.append(images) or Summary("x")
    )
    assert main(["overlay", "--demo", "--devices", "2"]) == 0
    assert exported == [[]]
    assert os.listdir(here) == []


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--images", "x"], "--images"),
        (["--model", "x"], "--model"),
        (["--ckpt", "x"], "--ckpt"),
        (["--new-head"], "--new-head"),
    ],
)
def test_demo_takes_no_other_images_and_no_other_model(flags, name, capsys):
    fails(
        ["overlay", "--demo", *flags], 2, f"--demo has its own photographs and network; leave out {name}", capsys=capsys
    )


def test_images_and_model_are_required_without_demo(capsys):
    fails(["overlay", "--model", "test_vit"], 2, "required: --images, --out", capsys=capsys)
    fails(["overlay", "--images", "x", "--out", "y"], 2, "--ckpt --model --compare is required", capsys=capsys)
