"""Test timm models by name, and weights from files, whose code is never executed."""

import pickle
import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.models.backbone import class_names_of, create_backbone, preprocess_of
from visionattn.models.weights import weights_mismatch


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_are_loaded_from_a_file(suffix, tmp_path):
    source = timm.create_model("test_vit", num_classes=7)
    file = tmp_path / f"w.{suffix}"
    if suffix == "pth":
        torch.save({"state_dict": source.state_dict()}, file)
    else:
        save_file(source.state_dict(), file)
    image = torch.randn(1, 3, 160, 160)
    model = create_backbone("test_vit", weights=file)
    torch.testing.assert_close(model.eval()(image), source.eval()(image))
    new_head = create_backbone("test_vit", weights=file, num_classes=3)
    assert new_head(image).shape == (1, 3)
    torch.testing.assert_close(new_head.forward_features(image), source.forward_features(image))


def test_weights_file_with_code_raises(tmp_path):
    class RunsCode:
        def __reduce__(self):
            return print, ("code from the weights file runs",)

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"state_dict": RunsCode()}))
    with pytest.raises(DataError, match="no weights that can be read safely"):
        create_backbone("test_vit", weights=tmp_path / "w.pth")


def test_unknown_models_options_and_weights_raise(tmp_path):
    with pytest.raises(UsageError, match=r"no model 'vit_smal_patch16_224'\. Nearest: vit_small_patch16_224"):
        create_backbone("vit_smal_patch16_224")
    with pytest.raises(DataError, match="there is no weights file"):
        create_backbone("test_vit", weights=tmp_path / "nothing.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match="do not fit this test_vit"):
        create_backbone("test_vit", weights=tmp_path / "w.pth")


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("fraction", [1.0, 0.9, 0.965, 1.15])
def test_inputs_equal_those_of_timms_own_transform(mode, fraction):
    """1.15 is the value of three of timm's models."""
    random = np.random.default_rng(0)
    for height, width, interpolation in ((96, 96, "bicubic"), (64, 97, "bilinear")):
        model = nn.Identity()
        model.pretrained_cfg = {
            "input_size": (3, height, width), "crop_pct": fraction, "crop_mode": mode, "interpolation": interpolation,
            "mean": (0.5, 0.4, 0.3), "std": (1.0, 1.0, 1.0),
        }  # fmt: skip
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
        for size in ((40, 60), (201, 133), (96, 96), (97, 501)):
            picture = random.integers(0, 256, (*size, 3), dtype=np.uint8)
            theirs = transform(Image.fromarray(picture)).numpy()
            np.testing.assert_allclose(preprocess_of(model)(picture)[0], theirs, atol=1 / 255)


def test_preprocess_and_class_names_are_those_of_the_models_configuration():
    preprocess = preprocess_of(timm.create_model("vit_base_patch16_clip_224.openai"))
    assert preprocess.input_size == (224, 224)
    assert preprocess.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    squashed = nn.Identity()
    squashed.pretrained_cfg = timm.get_pretrained_cfg("dm_nfnet_f0.dm_in1k").to_dict()
    assert (preprocess_of(squashed).fit, preprocess_of(squashed).crop_fraction) == ("stretch", 0.9)
    assert class_names_of(timm.create_model("resnet18"))[281].startswith("tabby")
    assert class_names_of(timm.create_model("resnet18", num_classes=3)) == ()


def test_weights_of_another_model_are_refused_with_three_names_and_a_count(tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "other.pth")
    with pytest.raises(DataError) as error:
        create_backbone("test_vit", weights=tmp_path / "other.pth")
    assert re.search(
        r"other\.pth \(--weights\) do not fit this test_vit: "
        r"\d+ missing \(\S+, \S+, \S+, …\); \d+ unknown \(\S+, \S+, \S+, …\)",
        str(error.value),
    )
    assert len(str(error.value)) < 400
    model = timm.create_model("test_resnet", num_classes=3)
    state = {**model.state_dict(), "fc.weight": torch.zeros(5, 2)}
    assert weights_mismatch(model, state) == f"1 of another shape (fc.weight (5, 2) and not {(3, model.num_features)})"
    assert weights_mismatch(model, model.state_dict()) == ""


@pytest.mark.parametrize(
    ("name", "head"), [("test_resnet", "fc"), ("test_vit", "head"), ("mobilenetv3_small_050", "classifier")]
)
def test_a_replaced_head_has_no_known_class_names(name, head):
    model = timm.create_model(name)
    assert len(class_names_of(model)) == 1000
    setattr(model, head, torch.nn.Linear(getattr(model, head).in_features, 5))
    assert class_names_of(model) == ()
    model.reset_classifier(7)
    assert class_names_of(model) == ()


@pytest.mark.parametrize("pretrained", [False, True])
def test_models_in_missing_or_broken_places_are_refused(pretrained, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    options = {"pretrained": pretrained}
    message = (
        r"local-dir:nothing cannot be read from the folder nothing \(Config file not found: nothing/config\.json\)$"
    )
    refuses(DataError, message, create_backbone, "local-dir:nothing", **options)
    (tmp_path / "broken").mkdir()
    for content in ("{", "{}", '{"architecture": "no_model"}'):
        (tmp_path / "broken" / "config.json").write_text(content)
        refuses(DataError, "cannot be read from the folder broken", create_backbone, "local-dir:broken", **options)
    message = r"hf-hub:owner/none could not be loaded from the hub \(.*give their folder instead: local-dir:FOLDER"
    refuses(DataError, message, create_backbone, "hf-hub:owner/none", **options)
