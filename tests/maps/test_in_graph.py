"""An exported graph computes the same heatmaps as the method that it was exported with."""

import subprocess
import sys

import pytest
import torch

from tests.capture.models import swin, torchvision_vit, vit
from tests.commands.programs import close, gated, images
from visionattn.commands.graph import export_graph
from visionattn.data import Preprocess

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
def test_an_exported_graph_gives_the_heatmaps_of_its_method_for_any_number_of_images(model, method, tmp_path):
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
def test_an_exported_graph_handles_shifted_windows(tmp_path):
    model = swin()
    with pytest.warns(match="attend inside windows"):
        export_graph(model, tmp_path / "x.pt2", method="rollout", preprocess=Preprocess(32))
    close(torch.export.load(tmp_path / "x.pt2").module()(images(5, 32)), model, "rollout", images(5, 32))
