"""Any model by one string: the kinds of names, and what is said of names of no kind."""

import builtins
import pickle
import sys

import numpy as np
import pytest
import timm
import torch

import visionattn as va
from tests.models import transformers_detectors
from tests.models.transformers_folders import vit
from tests.refusals import refuses
from visionattn.data import Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.models import Classifier
from visionattn.models.resolve import check_size, create_network, kind_of, load_model

OWN = """
from torch import nn

def make():
    return nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), nn.Flatten(), nn.Linear(4 * 8 * 8, 3))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A current folder with a module, a model of transformers and one of timm."""
    (tmp_path / "named_network_of_a_test.py").write_text(OWN)
    vit(tmp_path / "vit")
    model = timm.create_model("test_vit", num_classes=4)
    config = {"label_names": ["a", "b", "c", "d"]}
    timm.models.save_for_hf(model, tmp_path / "timm", model_config=config)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("named_network_of_a_test", None)


@pytest.mark.parametrize(
    ("name", "outputs", "size"),
    [
        ("test_vit", 1000, 160),
        ("local-dir:timm", 4, 160),
        ("torchvision:squeezenet1_1", 1000, 224),
        ("hf:vit", 3, 32),
        ("named_network_of_a_test:make", 3, 32),
    ],
)
def test_every_kind_of_name_gives_a_model_with_its_preprocessing(name, outputs, size, folder):
    own = Preprocess(32) if ":make" in name else None
    model = load_model(name, pretrained=name.startswith(("hf", "local", "named")), preprocess=own)
    assert not model.training
    assert model.preprocess.input_size == (size, size)
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    assert model(torch.from_numpy(model.preprocess(picture)[0])[None]).shape == (1, outputs)
    seen = va.heatmap(model, picture, method="gradcam")
    assert seen.values.shape == (50, 70)
    assert (seen.class_name is None) == (not model.class_names)


def test_names_come_with_the_weights_of_the_name(folder):
    assert load_model("hf:vit").class_names == ("kind 0", "kind 1", "kind 2")
    assert load_model("hf:vit", classes=["x", "y", "z"]).class_names == ("x", "y", "z")
    assert load_model("local-dir:timm").class_names == ("a", "b", "c", "d")
    assert load_model("hf:vit", pretrained=False).class_names == ()


@pytest.mark.parametrize("name", ["test_vit", "local-dir:timm", "torchvision:resnet18", "hf:vit"])
def test_a_backbone_of_every_kind_gets_a_head(name, folder):
    network = Classifier(name, num_classes=5)
    size = 32 if name == "hf:vit" else 160
    assert network.eval()(torch.randn(2, 3, size, size)).shape == (2, 5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnte50", r"timm has no model 'resnte50'\. Nearest: .*resnet50"),
        ("torchvison:resnet50", r"is not a model name\. Nearest: torchvision:\. Give a name of timm, hf-hub:OWNER/"),
        ("https:resnet/50", "is not a model name. Give .* or MODULE:FUNCTION of your own"),
        ("google/vit-base", r"write hf:google/vit-base\. Give a name of timm"),
        ("model.onnx", "is a graph without modules, in which neither attention nor gradients can be recorded"),
        ("model.pt2", "is a graph without modules"),
        ("best.ckpt", "is a checkpoint; give it as --ckpt"),
        ("w.safetensors", "is a file of weights; give it as --weights with --model NAME"),
        ("hf://owner/name", "is a checkpoint of visionattn on the hub; give it as --ckpt"),
        ("hf:no_folder", "hf:no_folder is neither a folder nor a model on the hub, which is named hf:OWNER/NAME"),
        ("torchvision:resnte50", r"torchvision has no classifier 'resnte50'\. Nearest: resnet50"),
        ("no_module_of_a_test:make", "there is no Python module 'no_module_of_a_test'"),
    ],
)
def test_a_name_of_no_kind_is_refused(name, message):
    refuses(UsageError, message, load_model, name)


def test_an_own_network_is_no_backbone():
    assert kind_of("mynet:make") == "own"
    refuses(UsageError, "give your own network as a class: network: {class_path", create_network, "mynet:make")


def test_a_size_that_the_network_refuses_is_named(folder):
    network = load_model("named_network_of_a_test:make").network
    check_size(network, Preprocess(32), "own")
    refuses(
        UsageError, r"own does not accept images of 48 × 48 pixels \(mat1", check_size, network, Preprocess(48), "own"
    )


def test_transformers_is_needed_only_for_its_models(monkeypatch):
    monkeypatch.delitem(sys.modules, "transformers", raising=False)
    real = builtins.__import__

    def without(name, *arguments, **options):
        if name == "transformers":
            raise ImportError("No module named 'transformers'")
        return real(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    load_model("test_resnet", pretrained=False)
    refuses(UsageError, r"needs the package transformers .*; install visionattn\[transformers\]", load_model, "hf:a/b")


def test_new_head_needs_weights(folder):
    for name in ("test_vit", "torchvision:resnet18", "hf:vit", "named_network_of_a_test:make"):
        refuses(UsageError, "new_head .* needs weights", load_model, name, new_head=True)
    refuses(DataError, "there is no weights file", load_model, "test_vit", weights="none.pth")


def test_random_weights_need_the_name_of_a_model(folder):
    message = "named_network_of_a_test:make returns weights of its own; random weights .* need the name of a model"
    refuses(UsageError, message, load_model, "named_network_of_a_test:make", pretrained=False)


class RunsCode:
    def __reduce__(self):
        return print, ("code from the weights file runs",)


@pytest.mark.parametrize(("name", "source"), [("hf:vit", "vit"), ("local-dir:timm", "timm")])
def test_a_pickle_in_the_folder_of_a_model_runs_no_code(name, source, folder, capsys):
    (folder / source / "model.safetensors").unlink(missing_ok=True)  # timm may write pytorch_model.bin alone
    for content in (torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))):
        content({"head.weight": RunsCode()}, folder / source / "pytorch_model.bin")
        refuses(DataError, rf"{source}.* \(", load_model, name)
    assert "runs" not in capsys.readouterr().out


def test_a_function_that_returns_a_network_of_timm_brings_class_names():
    model = load_model("visionattn.models:efficientnet_lite0")
    assert model.class_names[967] == "espresso"
    assert load_model("visionattn.models:efficientnet_lite0", classes=["a"] * 1000).class_names[967] == "a"


def test_a_detector_is_no_backbone(tmp_path):
    transformers_detectors.save(tmp_path, "rt_detr")
    refuses(UsageError, "is a detector, which cannot be a backbone", create_network, f"hf:{tmp_path}", num_classes=2)
