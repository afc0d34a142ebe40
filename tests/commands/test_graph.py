"""An exported graph has the outputs of the model and the method; otherwise no file is written."""

import json

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.capture.models import vit
from tests.commands.programs import assert_graph_equals_model, images, resnet_with_cbam
from tests.conftest import CONFIGS
from tests.models.compared import pictures
from tests.models.detectors.small import query
from tests.refusals import refuses
from tests.versions import needs_onnx_exporter
from visionattn.attention import TokenMerging, reduce_tokens
from visionattn.commands.graph import export_graph
from visionattn.data import Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.models import ConvNet

PREPROCESS = Preprocess(64)


def test_a_failure_of_the_exporter_names_the_release_of_torch(tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise ValueError("the pass does not support functions\nsecond line")

    monkeypatch.setattr(torch.onnx, "export", fail)
    message = (
        r"torch \d.* cannot write this VisionTransformer as \.onnx \(the pass does not support functions\); install"
    )
    refuses(DataError, message, export_graph, vit(), tmp_path / "x.onnx", preprocess=PREPROCESS)
    assert not list(tmp_path.iterdir())


@needs_onnx_exporter
@pytest.mark.parametrize(
    ("build", "method"), [(vit, "rollout"), pytest.param(resnet_with_cbam, "gradcam", marks=pytest.mark.slow)]
)
def test_onnx_outputs_equal_the_models_for_any_batch_size(build, method, tmp_path):
    import onnx
    import onnxruntime

    model, class_names = build(), list("abcdefg")
    exported = export_graph(model, tmp_path / "x.onnx", method=method, preprocess=PREPROCESS, class_names=class_names)
    assert exported.difference < 1e-4
    session = onnxruntime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.shape[1:]) for i in session.get_inputs()] == [("images", [3, 64, 64])]
    assert [o.name for o in session.get_outputs()] == ["scores", "heatmap"]
    for count in (1, 2, 5):
        outputs = session.run(None, {"images": images(count).numpy()})
        assert_graph_equals_model(outputs, model, method, images(count))
    description = json.loads({p.key: p.value for p in onnx.load(tmp_path / "x.onnx").metadata_props}["visionattn"])
    assert description["method"] == method
    assert description["class_names"] == list("abcdefg")
    assert description["preprocess"]["size"] == 64


@pytest.mark.parametrize(
    "preprocess",
    [
        Preprocess(64, crop_fraction=0.875, interpolation="bicubic"),
        Preprocess(64, fit="stretch", crop_fraction=0.9, interpolation="lanczos", rounding="down"),
        Preprocess((64, 48), fit="stretch", interpolation="nearest", mean=(0.1, 0.2, 0.3), std=(0.5, 0.4, 0.3)),
        Preprocess(64, crop_fraction=0.8, interpolation="bilinear", rounding="down", channel_order="bgr"),
    ],
)
def test_the_readme_prepares_images_by_the_metadata_of_a_file(preprocess, tmp_path):
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.head = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.conv(x).mean((2, 3)))

    export_graph(Plain().eval(), tmp_path / "x.pt2", method="gradcam", preprocess=preprocess)
    files = {"visionattn": ""}
    torch.export.load(tmp_path / "x.pt2", extra_files=files)
    steps = json.loads(files["visionattn"])["preprocess"]
    page = (CONFIGS.parent / "visionattn/training/README.md").read_text().split("### Images for an exported graph")[1]
    names = {}
    exec(page.split("```python\n")[1].split("```")[0], names)
    for picture in pictures([(97, 131), (301, 202), (63, 240)]):
        ours, theirs = preprocess(picture)[0][None], names["prepare"](Image.fromarray(picture), steps)
        np.testing.assert_allclose(theirs, ours, atol=1e-5)


def test_a_file_whose_outputs_differ_from_the_model_is_not_written(tmp_path, monkeypatch):
    from visionattn.commands import graph

    class WrongGraph(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3), keepdim=True)[:, 0, 0].expand(-1, 7) + 1, x[:, 0, :4, :4]

    monkeypatch.setitem(graph._RUNNERS, ".pt2", lambda content: WrongGraph())
    with pytest.raises(DataError, match="its outputs differ from the model's by up to"):
        export_graph(vit(), tmp_path / "x.pt2", preprocess=PREPROCESS)
    assert not list(tmp_path.iterdir())


def test_export_leaves_the_model_unchanged(tmp_path):
    model = resnet_with_cbam().train()
    model.layer1.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(UsageError):
        export_graph(model, tmp_path / "x.pt2", method="layercam", preprocess=PREPROCESS)
    export_graph(model, tmp_path / "x.pt2", method="gradcam", preprocess=PREPROCESS)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def vit_with_merging():
    model = vit()
    reduce_tokens(model, TokenMerging(2))
    return model


@pytest.mark.parametrize(
    ("build", "method", "message"),
    [
        (vit, "chefer", "chefer needs gradients.*fit this model in a graph: raw, rollout$"),
        (vit, "gradcam", "a linear head.*fit this model in a graph: raw, rollout$"),
        (vit, "gate", "gate needs gates.*fit this model in a graph: raw, rollout$"),
        (resnet_with_cbam, "layercam", "layercam needs gradients.*gate, gradcam$"),
        (lambda: timm.create_model("test_convnext"), None, "a linear head.*no other method can be exported$"),
        (lambda: ConvNet(3, pool=3), None, "a linear head.*no other method"),
        (vit_with_merging, "raw", "selects its tokens"),
        (query, None, r"QueryDetector finds boxes; export its weights as \.safetensors"),
        (vit, "rolout", "no method 'rolout'. Nearest: rollout"),
    ],
)
def test_models_and_methods_that_no_graph_supports_are_errors(build, method, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        export_graph(build(), tmp_path / "x.pt2", method=method, preprocess=PREPROCESS)
