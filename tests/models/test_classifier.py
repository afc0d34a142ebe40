"""Test the classifier: timm's options, weights from a file, and attention inserted after the weights are loaded."""

import jsonargparse
import pytest
import timm
import torch

from visionattn.attention import SE, RegisterToken
from visionattn.attention.insertion.inserting import Inserted
from visionattn.errors import UsageError
from visionattn.models import Classifier


def test_classifier_passes_options_to_timm():
    model = Classifier("test_vit", num_classes=4, options={"img_size": 64})
    assert model(torch.randn(2, 3, 64, 64)).shape == (2, 4)
    with pytest.raises(UsageError, match="does not accept these options"):
        Classifier("test_vit", num_classes=4, options={"drop_paths": 1})


def test_classifier_inserts_attention_after_loading_weights(tmp_path):
    source = timm.create_model("test_vit", num_classes=7).eval()
    torch.save(source.state_dict(), tmp_path / "w.pth")
    options = {"weights": str(tmp_path / "w.pth"), "attention": lambda channels: SE(channels, reduction=4)}
    image = torch.randn(2, 3, 160, 160)
    model = Classifier("test_vit", num_classes=7, **options).eval()
    assert torch.equal(model(image), source(image))
    assert "backbone.blocks.0.inserted.gamma" in model.state_dict()
    without_gate = Classifier(
        "test_vit", num_classes=7, **options, attention_at=["blocks.4.mlp"], attention_preserve=False
    ).eval()
    names = {name for name in without_gate.state_dict() if ".inserted." in name}
    assert {name.partition(".inserted.")[0] for name in names} == {"backbone.blocks.4.mlp"}
    assert not any(name.endswith("gamma") for name in names)
    assert not torch.equal(without_gate(image), source(image))


def test_insertion_uses_the_image_size_of_the_options():
    options = {"img_size": (64, 96), "depths": (1, 1), "embed_dim": (32, 64), "stem_width": 16, "in_chans": 1}
    model = Classifier("maxvit_tiny_tf_224", num_classes=4, options=options, attention=SE)
    grids = [part.layout.grid for part in model.modules() if isinstance(part, Inserted)]
    assert grids == [(16, 24), (8, 12)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of jsonargparse's newest release
def test_classifier_takes_the_neurons_of_a_register_from_yaml():
    parser, neurons = jsonargparse.ArgumentParser(exit_on_error=False), {"blocks.0.mlp.fc2": [1, 7]}
    parser.add_argument("--network", type=torch.nn.Module)
    arguments = {"backbone": "test_vit", "num_classes": 4, "options": {"img_size": 64}, "registers": neurons}
    config = parser.parse_object({"network": {"class_path": "visionattn.models.Classifier", "init_args": arguments}})
    model, image = parser.instantiate_classes(config).network.eval(), torch.randn(2, 3, 64, 64)
    plain = Classifier("test_vit", num_classes=4, options={"img_size": 64}).eval()
    plain.load_state_dict(model.state_dict())
    assert not torch.equal(model(image), plain(image))
    with RegisterToken(plain.backbone, neurons):
        assert torch.equal(model(image), plain(image))
