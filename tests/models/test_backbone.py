"""timm's models by name, with weights from files that run no code."""

import pickle

import pytest
import timm
import torch
from safetensors.torch import save_file

from visionattn.attention import SE
from visionattn.attention.insertion import Inserted
from visionattn.errors import DataError, UsageError
from visionattn.models import Classifier, ConvNet
from visionattn.models.backbone import class_names_of, create_backbone, preprocess_of


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_of_a_file_are_loaded(suffix, tmp_path):
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


def test_a_weights_file_that_would_run_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("code of a stranger runs",)

    (tmp_path / "w.pth").write_bytes(pickle.dumps({"state_dict": Evil()}))
    with pytest.raises(DataError, match="no weights that can be read safely"):
        create_backbone("test_vit", weights=tmp_path / "w.pth")


def test_what_cannot_be_had_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"no model 'vit_smal_patch16_224'\. Nearest: vit_small_patch16_224"):
        create_backbone("vit_smal_patch16_224")
    with pytest.raises(DataError, match="there is no weights file"):
        create_backbone("test_vit", weights=tmp_path / "nothing.pth")
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "w.pth")
    with pytest.raises(DataError, match="are not those of a test_vit"):
        create_backbone("test_vit", weights=tmp_path / "w.pth")


def test_the_preparation_is_the_one_timm_names():
    preprocess = preprocess_of(timm.create_model("vit_base_patch16_clip_224.openai"))
    assert preprocess.input_size == (224, 224)
    assert preprocess.mean == pytest.approx((0.48145466, 0.4578275, 0.40821073))
    assert class_names_of(timm.create_model("resnet18"))[281].startswith("tabby")
    assert class_names_of(timm.create_model("resnet18", num_classes=3)) == ()


def test_a_classifier_passes_its_options_on():
    model = Classifier("test_vit", num_classes=4, options={"img_size": 64})
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    with pytest.raises(UsageError, match="takes other options"):
        Classifier("test_vit", num_classes=4, options={"drop_paths": 1})


def test_a_classifier_takes_attention_after_its_weights(tmp_path):
    source = timm.create_model("test_vit", num_classes=7).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    make = {"weights": str(tmp_path / "w.pth"), "attention": lambda channels: SE(channels, reduction=4)}
    image = torch.randn(2, 3, 160, 160)
    model = Classifier("test_vit", num_classes=7, **make).eval()
    assert torch.equal(model(image), source(image))
    assert "backbone.blocks.0.inserted.gamma" in model.state_dict()
    other = Classifier(
        "test_vit", num_classes=7, **make, attention_at=["blocks.4.mlp"], attention_preserve=False
    ).eval()
    names = {name for name in other.state_dict() if ".inserted." in name}
    assert {name.partition(".inserted.")[0] for name in names} == {"backbone.blocks.4.mlp"}
    assert not any(name.endswith("gamma") for name in names)
    assert not torch.equal(other(image), source(image))


def test_attention_is_measured_at_the_size_of_the_options():
    options = {"img_size": (64, 96), "depths": (1, 1), "embed_dim": (32, 64), "stem_width": 16, "in_chans": 1}
    model = Classifier("maxvit_tiny_tf_224", num_classes=4, options=options, attention=SE)
    grids = [part.layout.grid for part in model.modules() if isinstance(part, Inserted)]
    assert grids == [(16, 24), (8, 12)]


def test_the_convnet_has_the_grid_and_the_gates_that_it_promises():
    from visionattn.attention import CBAM
    from visionattn.maps import capture

    model = ConvNet(5, widths=(16, 32), depth=2, attention=lambda channels: CBAM(channels, reduction=4)).eval()
    with torch.no_grad(), capture(model) as records:
        assert model(torch.randn(2, 3, 64, 48)).shape == (2, 5)
    spatial = [record.grid for record in records.gates if record.kind == "spatial_gate"]
    assert spatial == [(16, 12), (16, 12), (8, 6), (8, 6)]
    with pytest.raises(ValueError, match="at least one class"):
        ConvNet(0)
    with pytest.raises(ValueError, match="pool must be"):
        ConvNet(5, pool=0.5)


@pytest.mark.parametrize("pool", [1.0, 2.0, 3.5])
def test_the_convnet_pools_by_the_generalised_mean(pool):
    model = ConvNet(5, widths=(16,), pool=pool).eval()
    x = torch.rand(2, 3, 24, 16)
    features = model.blocks(model.stem(x)).detach().double()
    pooled = torch.zeros(2, 16, dtype=torch.float64)
    for image in range(2):
        for channel in range(16):
            values = [max(1e-5, float(value)) for value in features[image, channel].flatten()]
            pooled[image, channel] = (sum(value**pool for value in values) / len(values)) ** (1 / pool)
    torch.testing.assert_close(model(x), model.head(pooled.float()), atol=1e-4, rtol=1e-4)
