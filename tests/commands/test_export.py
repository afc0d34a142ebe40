"""`visionattn export`: weights without pickle, and graphs."""

import json
import zipfile

import pytest
import torch
from PIL import Image

import visionattn as va
from tests.commands.programs import close
from visionattn.cli import main
from visionattn.errors import DataError
from visionattn.training import export, load


def test_exported_weights_are_the_same_model_without_pickle(quick_run, tmp_path, capsys):
    from visionattn.cli import main

    out = tmp_path / "model.safetensors"
    assert main(["export", "--ckpt", str(quick_run / "best.ckpt"), "--out", str(out)]) == 0
    task, again = load(quick_run / "best.ckpt"), load(out)
    assert again.class_names == task.class_names
    assert again.preprocess == task.preprocess
    for name, value in task.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not zipfile.is_zipfile(out)
    flags = ["--images", str(tmp_path), "--out", str(tmp_path / "seen"), "--ckpt", str(out)]
    Image.new("RGB", (64, 64), "white").save(tmp_path / "x.png")
    assert main(["overlay", *flags]) == 0
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(DataError, match="cut short or another kind"):
        load(out)
    assert main(["export", "--ckpt", str(quick_run / "best.ckpt"), "--out", "model.pt"]) == 2
    with pytest.raises(DataError, match="cannot be written"):
        export(quick_run / "best.ckpt", tmp_path / "nowhere" / "x.safetensors")


def test_the_command_line_exports_a_graph(quick_run, tmp_path, capsys):
    assert main(["export", "--ckpt", str(quick_run / "best.ckpt"), "--out", str(tmp_path / "x.pt2")]) == 0
    out = capsys.readouterr().out
    assert "images (B, " in out
    assert "differs from the model by at most" in out
    program = torch.export.load(tmp_path / "x.pt2", extra_files=(extra := {"visionattn": ""})).module()
    about = json.loads(extra["visionattn"])
    task = va.load(quick_run / "best.ckpt")
    size = about["preprocess"]["size"]
    batch = torch.randn(2, len(about["preprocess"]["mean"]), size, size)
    close(program(batch), task.network, about["method"], batch)
    assert tuple(about["class_names"]) == task.class_names
    for arguments, message in (
        (["--format", "onnx", "--out", "x.pt2"], "--out must end in .onnx"),
        (["--out", "x.pkl"], "--out must end in one of .safetensors, .onnx, .pt2"),
        (["--out", "x.safetensors", "--method", "raw"], "and no method"),
    ):
        assert main(["export", "--ckpt", str(quick_run / "best.ckpt"), *arguments]) == 2
        assert message in capsys.readouterr().err
