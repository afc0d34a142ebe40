"""Graphs that return scores and heatmap, held against the methods that they stand for."""

import json
import subprocess
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
from torch import nn

import visionattn as va
from tests.maps.models import swin, torchvision_vit, vit
from tests.models.detectors import query
from visionattn.attention import CBAM, TokenMerging, reduce_tokens
from visionattn.cli import main
from visionattn.data import Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.exporting import export_graph
from visionattn.maps import METHODS, MapWarning
from visionattn.models import ConvNet


def gated():
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=7)
    va.insert(model, CBAM, at="stages", preserve=False)
    model.fc.weight.data.uniform_(0, 0.2)  # features are ≥ 0: every class's map is above 0 somewhere
    return model.eval()


def images(count, size=64):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(count))


def close(found, model, method, batch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MapWarning)  # of windows, and of random weights' constant maps
        maps = METHODS[method]()(model, batch)
    scores, heatmap = (torch.as_tensor(np.asarray(part)) for part in found)
    torch.testing.assert_close(scores, maps.output, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(heatmap, maps.heatmaps, atol=1e-4, rtol=0)
    assert len(batch) < 5 or heatmap.amax() == 1


PLAIN = Preprocess(64)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (vit, "raw"),
        (gated, "gradcam"),
        (gated, "gate"),
        pytest.param(torchvision_vit, "rollout", marks=pytest.mark.slow),
        pytest.param(vit, "rollout", marks=pytest.mark.slow),
    ],
)
def test_a_program_gives_the_heatmap_of_the_method_for_any_number_of_images(model, method, tmp_path):
    model = model()
    told = export_graph(model, tmp_path / "x.pt2", method=method, preprocess=PLAIN)
    assert told.method == method
    program = torch.export.load(tmp_path / "x.pt2").module()
    for count in (1, 2, 5):
        close(program(images(count)), model, method, images(count))
    code = (
        "import sys, torch; scores, heatmap = torch.export.load('x.pt2').module()(torch.zeros(4, 3, 64, 64));"
        "print(*scores.shape, *heatmap.shape[:1], *{'visionattn', 'timm', 'torchvision'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["4", "7", "4"]


@pytest.mark.slow
def test_windows_that_are_shifted_are_put_together_in_a_program(tmp_path):
    model = swin()
    with pytest.warns(match="attend inside windows"):
        export_graph(model, tmp_path / "x.pt2", method="rollout", preprocess=Preprocess(32))
    close(torch.export.load(tmp_path / "x.pt2").module()(images(5, 32)), model, "rollout", images(5, 32))


@pytest.mark.onnx
@pytest.mark.parametrize(
    ("model", "method"), [(vit, "rollout"), pytest.param(gated, "gradcam", marks=pytest.mark.slow)]
)
def test_onnx_gives_the_same_for_any_number_of_images(model, method, tmp_path):
    import onnx
    import onnxruntime

    model = model()
    told = export_graph(model, tmp_path / "x.onnx", method=method, preprocess=PLAIN, class_names=list("abcdefg"))
    assert told.difference < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("images", [3, 64, 64])]
    assert [o.name for o in session.get_outputs()] == ["scores", "heatmap"]
    for count in (1, 2, 5):
        close(session.run(None, {"images": images(count).numpy()}), model, method, images(count))
    about = json.loads({p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}["visionattn"])
    assert about["method"] == method
    assert about["class_names"] == list("abcdefg")
    assert about["preprocess"]["size"] == 64


def test_a_file_that_differs_from_the_model_is_not_written(tmp_path, monkeypatch):
    from visionattn import exporting

    class Off(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3), keepdim=True)[:, 0, 0].expand(-1, 7) + 1, x[:, 0, :4, :4]

    monkeypatch.setitem(exporting._RUNNERS, ".pt2", lambda content: Off())
    with pytest.raises(DataError, match="gives other values than the model"):
        export_graph(vit(), tmp_path / "x.pt2", preprocess=PLAIN)
    assert not list(tmp_path.iterdir())


def test_the_model_is_left_as_it_was(tmp_path):
    model = gated().train()
    model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError):
        export_graph(model, tmp_path / "x.pt2", method="layercam", preprocess=PLAIN)
    export_graph(model, tmp_path / "x.pt2", method="gradcam", preprocess=PLAIN)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def merged():
    model = vit()
    reduce_tokens(model, TokenMerging(2))
    return model


@pytest.mark.parametrize(
    ("model", "method", "message"),
    [
        (vit, "chefer", "chefer needs gradients.*can be exported with it: raw, rollout$"),
        (vit, "gradcam", "a linear head.*can be exported with it: raw, rollout$"),
        (vit, "gate", "gate needs gates.*can be exported with it: raw, rollout$"),
        (gated, "layercam", "layercam needs gradients.*gate, gradcam$"),
        (lambda: timm.create_model("test_convnext"), None, "a linear head.*no other method can be exported$"),
        (lambda: ConvNet(3, pool=3), None, "a linear head.*no other method"),
        (merged, "raw", "picks its tokens"),
        (query, None, r"QueryDetector finds boxes; its weights can be exported, as \.safetensors"),
        (vit, "rolout", "no method 'rolout'. Nearest: rollout"),
    ],
)
def test_what_no_graph_can_hold_is_refused_by_name(model, method, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_graph(model(), tmp_path / "x.pt2", method=method, preprocess=PLAIN)


def test_the_command_line_exports(quick_run, tmp_path, capsys):
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
