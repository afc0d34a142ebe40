"""`visionattn export` writes weights as safetensors (without pickle), and graphs."""

import json
import zipfile

import pytest
import torch
from PIL import Image

import visionattn as va
from tests.commands.programs import assert_graph_equals_model
from visionattn.cli import main
from visionattn.errors import DataError
from visionattn.training import export, load


def test_exported_weights_load_as_the_same_model_without_pickle(quick_run, tmp_path, capsys):
    from visionattn.cli import main

    out = tmp_path / "model.safetensors"
    assert main(["export", "--ckpt", str(quick_run / "best.ckpt"), "--out", str(out)]) == 0
    task, exported = load(quick_run / "best.ckpt"), load(out)
    assert exported.class_names == task.class_names
    assert exported.preprocess == task.preprocess
    for name, value in task.state_dict().items():
        assert torch.equal(value, exported.state_dict()[name])
    assert not zipfile.is_zipfile(out)  # torch.save writes pickled data into a zip file
    flags = ["--images", str(tmp_path), "--out", str(tmp_path / "seen"), "--ckpt", str(out)]
    Image.new("RGB", (64, 64), "white").save(tmp_path / "x.png")
    assert main(["overlay", *flags]) == 0
    out.write_bytes(out.read_bytes()[:-1])
    with pytest.raises(DataError, match="cut short or another kind"):
        load(out)
    assert main(["export", "--ckpt", str(quick_run / "best.ckpt"), "--out", "model.pt"]) == 2
    with pytest.raises(DataError, match="cannot be written"):
        export(quick_run / "best.ckpt", tmp_path / "nowhere" / "x.safetensors")


def test_command_line_exports_a_graph_with_its_description(quick_run, tmp_path, capsys):
    assert main(["export", "--ckpt", str(quick_run / "best.ckpt"), "--out", str(tmp_path / "x.pt2")]) == 0
    out = capsys.readouterr().out
    assert "images (B, " in out
    assert "differs from the model by at most" in out
    program = torch.export.load(tmp_path / "x.pt2", extra_files=(extra := {"visionattn": ""})).module()
    description = json.loads(extra["visionattn"])
    task = va.load(quick_run / "best.ckpt")
    size = description["preprocess"]["size"]
    batch = torch.randn(2, len(description["preprocess"]["mean"]), size, size)
    assert_graph_equals_model(program(batch), task.network, description["method"], batch)
    assert tuple(description["class_names"]) == task.class_names
    for arguments, message in (
        (["--format", "onnx", "--out", "x.pt2"], "--out must end in .onnx"),
        (["--out", "x.pkl"], "--out must end in one of .safetensors, .onnx, .pt2"),
        (["--out", "x.safetensors", "--method", "raw"], "and no --method"),
    ):
        assert main(["export", "--ckpt", str(quick_run / "best.ckpt"), *arguments]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_missing_onnx_is_an_error_before_the_model_is_loaded(missing, tmp_path, monkeypatch, capsys):
    import importlib.util

    real = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else real(name))
    monkeypatch.setattr("visionattn.commands.export.load", lambda options: pytest.fail("the model was loaded"))
    out = tmp_path / "lite.onnx"
    assert main(["export", "--model", "test_vit", "--weights", "random", "--out", str(out)]) == 2
    assert f"writing ONNX needs the package {missing}; install visionattn[onnx]" in capsys.readouterr().err
    assert not out.exists()
