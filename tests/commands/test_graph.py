"""Exported graphs give the model's values, or are not written."""

import json

import pytest
import timm
import torch
from torch import nn

from tests.capture.models import vit
from tests.commands.programs import close, gated, images
from tests.models.detectors.small import query
from visionattn.attention import TokenMerging, reduce_tokens
from visionattn.commands.graph import export_graph
from visionattn.data import Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.models import ConvNet

PLAIN = Preprocess(64)


@pytest.mark.onnx
@pytest.mark.parametrize(
    ("model", "method"), [(vit, "rollout"), pytest.param(gated, "gradcam", marks=pytest.mark.slow)]
)
def test_onnx_gives_the_models_values_for_any_batch_size(model, method, tmp_path):
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
    from visionattn.commands import graph as exporting

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
def test_models_and_methods_without_a_graph_are_refused_by_name(model, method, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_graph(model(), tmp_path / "x.pt2", method=method, preprocess=PLAIN)
