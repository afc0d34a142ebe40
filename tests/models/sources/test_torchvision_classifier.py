"""torchvision's classifiers by name, with weights from the folder to which torchvision downloads them."""

import os
import warnings

import pytest
import torch
import torchvision

from tests.models.test_weights import RunsCode
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.models.resolve import load_model
from visionattn.models.sources.torchvision_classifier import create_torchvision_classifier


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A folder of downloads in which `save(weights, content)` puts a file, as the download would."""
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))

    def save(weights, content):
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        torch.save(content, tmp_path / "checkpoints" / os.path.basename(weights.url))

    return save


def test_weights_by_their_name_with_their_class_names(cache):
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    source = torchvision.models.resnet18().eval()
    cache(weights, source.state_dict())
    for name in ("torchvision:resnet18", "torchvision:resnet18/IMAGENET1K_V1", "torchvision:resnet18/DEFAULT"):
        model = load_model(name)
        x = torch.randn(1, 3, 64, 64)
        torch.testing.assert_close(model(x), source(x))
        assert model.class_names == tuple(weights.meta["categories"])


def test_a_download_that_holds_code_is_refused(cache, capsys):
    cache(torchvision.models.ResNet18_Weights.IMAGENET1K_V1, RunsCode())
    refuses(DataError, "could not be loaded .*give a local file instead: --weights", load_model, "torchvision:resnet18")
    assert "runs" not in capsys.readouterr().out
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


def test_a_file_of_weights_sets_the_number_of_outputs(tmp_path):
    trained = torchvision.models.mobilenet_v3_small(num_classes=4).eval()
    torch.save({"state_dict": {f"module.{k}": v for k, v in trained.state_dict().items()}}, tmp_path / "w.pth")
    model = load_model("torchvision:mobilenet_v3_small", weights=tmp_path / "w.pth")
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(model(x), trained(x))
    assert model.class_names == ()
    fresh = create_torchvision_classifier(
        "torchvision:mobilenet_v3_small", weights=tmp_path / "w.pth", num_classes=9, new_head=True
    ).eval()
    torch.testing.assert_close(fresh.features(x), trained.features(x))
    assert fresh(x).shape == (1, 9)


@pytest.mark.parametrize("name", ["inception_v3", "googlenet"])
def test_auxiliary_heads_are_left_out(name, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = torchvision.models.get_model_builder(name)(init_weights=False, transform_input=True).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    model = create_torchvision_classifier(f"torchvision:{name}", weights=tmp_path / "w.pth")
    x = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(model.eval()(x), source(x))
    assert model.train()(torch.randn(2, 3, 96, 96)).shape == (2, 1000)


def test_names_that_torchvision_does_not_have_are_refused():
    refuses(UsageError, r"no weights 'V9'\. All: IMAGENET1K_V1, IMAGENET1K_V2", load_model, "torchvision:resnet50/V9")
    refuses(UsageError, "is no classifier", load_model, "torchvision:fasterrcnn_resnet50_fpn")
    refuses(UsageError, "does not accept these options", create_torchvision_classifier, "torchvision:resnet18", width=3)
