"""A failed write leaves the earlier file or no file, any file name can be printed, and addresses are refused."""

import os
from pathlib import Path

import numpy as np
import pytest
from torch import nn

from tests.commands.command_line import QUICKSTART
from tests.commands.scores import SCORES
from tests.overlays.folder.disks import disk_full_after
from tests.refusals import refuses
from visionattn.cli import main
from visionattn.commands.scorecard import write
from visionattn.data import Preprocess, find, read_image, write_image
from visionattn.errors import DataError, UsageError
from visionattn.files import local_path, natural_key, printable, write_file
from visionattn.models import create_backbone
from visionattn.overlays import Explainer, export
from visionattn.training import load


@pytest.mark.parametrize("suffix", [".csv", ".json"])
@pytest.mark.parametrize("older", [b"older figures", None], ids=["earlier file", "no earlier file"])
def test_a_full_disk_keeps_the_earlier_file(suffix, older, tmp_path):
    path = tmp_path / f"scores{suffix}"
    if older:
        path.write_bytes(older)
    with (
        disk_full_after(100),
        pytest.raises(DataError, match=rf"scores{suffix} cannot be written: File too large"),
    ):
        write(str(path), SCORES)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([older] if older else [])
    write(str(path), SCORES)
    assert path.stat().st_size > 100


def test_ctrl_c_keeps_the_earlier_file_and_removes_the_temporary_file(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    path.write_text("older figures")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(str(path), SCORES)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older figures"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"caf\xe9.jpg", "caf�.jpg"),
        ("a\x1b[31m.jpg", "a�[31m.jpg"),
        ("a\nb", "a�b"),
        ("ảnh 犬.png", "ảnh 犬.png"),
        ("no\u00a0break", "no break"),
    ],
)
def test_printable_replaces_characters_that_a_terminal_cannot_show(name, shown):
    assert printable(name) == shown
    shown.encode()  # valid text


ADDRESSES = ["s3://bucket/x.jpg", "https://host/x.jpg", "file:///x.jpg", "simplecache::s3://bucket/x.jpg"]


@pytest.mark.parametrize("address", ADDRESSES)
def test_addresses_are_refused_and_no_local_folder_is_made(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = np.zeros((2, 2, 3), np.uint8)
    Path("list.csv").write_text(f"path\n{address}\n")
    for act in (
        lambda: write_file(address, b""),
        lambda: write_image(address, picture),
        lambda: read_image(address),
        lambda: find(address, out="out"),
        lambda: find(["list.csv"], out="out"),
        lambda: export(["list.csv"], address, Explainer(nn.Identity(), Preprocess(8), None)),
        lambda: load(address),
        lambda: create_backbone("test_vit", weights=address),
    ):
        refuses((UsageError, DataError), "is an address, and only files on this machine are read and written", act)
    assert os.listdir() == ["list.csv"]


@pytest.mark.parametrize("path", ["a/b", "C://x", "./s3://x", "hf:/x", b"\xff://x", "a b://x", Path("s3://x")])
def test_other_names_are_local_paths(path):
    assert local_path(path) == os.fsdecode(path)


VERBS = [
    ("overlay --images {} --out out --model test_vit", "--images"),
    ("overlay --images in --out {} --model test_vit", "--out"),
    ("overlay --images in --out out --ckpt {}", "--ckpt"),
    ("overlay --images in --out out --compare a.ckpt {}", "--compare"),
    ("overlay --images in --out out --model test_vit --weights {}", "--weights"),
    ("explore --images in {} --out x.html --model test_vit", "--images"),
    ("explore --images in --out {} --model test_vit", "--out"),
    ("score --data {} --model test_vit", "--data"),
    ("score --data in --out {} --model test_vit", "--out"),
    ("export --model test_vit --out {}", "--out"),
    ("export --ckpt {} --out x.pt2", "--ckpt"),
    ("push --ckpt {} --repo a/b", "--ckpt"),
    ("push --ckpt a.ckpt --repo a/b --picture {}", "--picture"),
    ("data check {}", "path"),
    ("data check in --images {}", "--images"),
    ("fit --config {}", "--config"),
    (f"fit --config {QUICKSTART} --trainer.default_root_dir {{}}", "--trainer.default_root_dir"),
    (f"test --config {QUICKSTART} --ckpt_path {{}}", "--ckpt_path"),
]


@pytest.mark.parametrize(("command", "option"), VERBS)
def test_every_verb_refuses_addresses(command, option, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(command.format("s3://bucket/x.onnx").split()) == 2
    message = f"error: {option}: s3://bucket/x.onnx is an address, and only files on this machine are read and written"
    assert message in capsys.readouterr().err
    assert os.listdir() == []


def test_natural_order_has_no_equal_keys():
    names = ["img10", "img2", "img1", "img01", "img", "1", "01", "a1b10", "a1b2"]
    assert sorted(names, key=natural_key) == ["01", "1", "a1b2", "a1b10", "img", "img01", "img1", "img2", "img10"]
    assert natural_key("img1") != natural_key("img01")
