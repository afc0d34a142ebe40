"""An exported graph computes the same heatmaps as its method."""

import subprocess
import sys

import pytest
import torch

from tests.capture.models import swin, torchvision_vit, vit
from tests.commands.programs import assert_graph_equals_model, images, resnet_with_cbam
from visionattn.commands.graph import export_graph
from visionattn.data import Preprocess

PREPROCESS = Preprocess(64)


@pytest.mark.parametrize(
    ("model", "method"),
    [
        (vit, "raw"),
        (resnet_with_cbam, "gradcam"),
        (resnet_with_cbam, "gate"),
        pytest.param(torchvision_vit, "rollout", marks=pytest.mark.slow),
        pytest.param(vit, "rollout", marks=pytest.mark.slow),
    ],
)
def test_an_exported_graph_gives_the_heatmaps_of_its_method_for_any_number_of_images(model, method, tmp_path):
    model = model()
    exported = export_graph(model, tmp_path / "x.pt2", method=method, preprocess=PREPROCESS)
    assert exported.method == method
    program = torch.export.load(tmp_path / "x.pt2").module()
    for count in (1, 2, 5):
        assert_graph_equals_model(program(images(count)), model, method, images(count))
    code = (
        "import sys, torch; scores, heatmap = torch.export.load('x.pt2').module()(torch.zeros(4, 3, 64, 64));"
        "print(*scores.shape, *heatmap.shape[:1], *{'visionattn', 'timm', 'torchvision'} & set(sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert process.stdout.split() == ["4", "7", "4"]


@pytest.mark.slow
def test_an_exported_graph_handles_shifted_windows(tmp_path):
    model = swin()
    with pytest.warns(match="attend inside windows"):
        export_graph(model, tmp_path / "x.pt2", method="rollout", preprocess=Preprocess(32))
    assert_graph_equals_model(
        torch.export.load(tmp_path / "x.pt2").module()(images(5, 32)), model, "rollout", images(5, 32)
    )
