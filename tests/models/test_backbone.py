"""Test timm models by name, with weights from files without executable code."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from visionattn.errors import DataError, UsageError
from visionattn.models.backbone import class_names_of, create_backbone, preprocess_of


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
    other = create_backbone("test_vit", weights=file, num_classes=3)
    assert other(image).shape == (1, 3)
    torch.testing.assert_close(other.forward_features(image), source.forward_features(image))


def test_weights_file_with_code_raises(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code of a stranger runs",)

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(DataError, match="no weights that can be read safely"):
        create_backbone("test_vit", weights=tmp_path / "w.pth")


def test_unknown_models_options_and_weights_raise(tmp_path):
    with pytest.raises(UsageError, match=r"no model 'vit_smal_patch16_224'\. Nearest: vit_small_patch16_224"):
        create_backbone("vit_smal_patch16_224")
    with pytest.raises(DataError, match="there is no weights file"):
        create_backbone("test_vit", weights=tmp_path / "nothing.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match="are not those of a test_vit"):
        create_backbone("test_vit", weights=tmp_path / "w.pth")


def test_preprocess_matches_timm():
    preprocess = preprocess_of(timm.create_model("vit_base_patch16_clip_224.openai"))
    assert preprocess.input_size == (224, 224)
    assert preprocess.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert class_names_of(timm.create_model("resnet18"))[281].startswith("tabby")
    assert class_names_of(timm.create_model("resnet18", num_classes=3)) == ()
