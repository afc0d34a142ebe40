"""Classifiers of transformers from folders that the tests make, compared with transformers itself."""

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

import visionattn as va
from tests.models.transformers_folders import change_config, vit, zero_shot
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.models.resolve import create_network, load_model


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)


@pytest.mark.parametrize("safe", [True, False])
def test_a_folder_gives_the_probabilities_of_transformers_own_pipeline(safe, tmp_path, picture):
    source = vit(tmp_path)
    if not safe:
        (tmp_path / "model.safetensors").unlink()
        torch.save(source.state_dict(), tmp_path / "pytorch_model.bin")
    seen = va.heatmap(load_model(f"hf:{tmp_path}"), picture)
    pipeline = transformers.pipeline("image-classification", model=str(tmp_path), device="cpu")
    best = max(pipeline(Image.fromarray(picture)), key=lambda answer: answer["score"])
    assert seen.class_name == best["label"]
    assert seen.probability == pytest.approx(best["score"], abs=1e-3)


def test_weights_of_another_number_of_classes_get_a_new_head(tmp_path):
    source = vit(tmp_path)
    network = create_network(f"hf:{tmp_path}", num_classes=7, pretrained=True)
    assert all(part.training for part in network.modules())
    network.eval()
    x = torch.randn(2, 3, 32, 32)
    assert network(x).shape == (2, 7)
    torch.testing.assert_close(network.model.vit(x).last_hidden_state, source.vit(x).last_hidden_state)
    torch.save({f"module.{name}": value for name, value in source.state_dict().items()}, tmp_path / "w.pth")
    loaded = load_model(f"hf:{tmp_path}", weights=tmp_path / "w.pth")
    torch.testing.assert_close(loaded(x), source(x).logits)


def test_both_heads_of_a_swiftformer_are_replaced(tmp_path):
    """Its logits are the mean of two heads, so both must have as many outputs as there are classes."""
    small = {"embed_dims": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "num_labels": 3}
    source = transformers.SwiftFormerForImageClassification(transformers.SwiftFormerConfig(**small)).eval()
    source.save_pretrained(tmp_path / "made")
    source.head, source.dist_head = torch.nn.Linear(8, 5), torch.nn.Linear(8, 5)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    name, x = f"hf:{tmp_path / 'made'}", torch.randn(2, 3, 64, 64)
    loaded = create_network(name, weights=tmp_path / "w.pth").eval()
    torch.testing.assert_close(loaded(x), source(x).logits)
    new = create_network(name, weights=tmp_path / "w.pth", new_head=True, num_classes=4).eval()
    assert new(x).shape == (2, 4)
    torch.testing.assert_close(new.model.swiftformer(x).last_hidden_state, source.swiftformer(x).last_hidden_state)


def test_a_model_without_a_head_gives_features(tmp_path):
    source = vit(tmp_path, kind="ViTModel")
    model = load_model(f"hf:{tmp_path}")
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), source(x).last_hidden_state[:, 0])
    assert (model.network.num_classes, model.class_names) == (0, ())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_zero_shot_logits_equal_the_models_own(kind, tmp_path, picture):
    source, tokenizer = zero_shot(tmp_path, kind)
    texts = ["a cat", "a dog", "two boats"]
    padding = {"padding": "max_length", "max_length": 20} if kind == "siglip" else {"padding": True}
    tokens = tokenizer(texts, **padding, return_tensors="pt")
    if kind == "siglip":
        del tokens["attention_mask"]
    x = torch.randn(2, 3, 32, 32)
    theirs = source(input_ids=tokens["input_ids"], attention_mask=tokens.get("attention_mask"), pixel_values=x)
    model = load_model(f"hf:{tmp_path}", classes=texts)
    torch.testing.assert_close(model(x), theirs.logits_per_image)
    seen = va.heatmap(model, picture, target="a dog", method="gradcam")
    assert seen.class_name in texts
    assert seen.target == 1
    refuses(UsageError, 'compares images with texts; name them: --classes "a cat, a dog"', load_model, f"hf:{tmp_path}")
    refuses(UsageError, "chooses among texts; give at least two", load_model, f"hf:{tmp_path}", classes=["a cat"])


def test_folders_that_cannot_be_used_are_refused(tmp_path, capsys):
    name = f"hf:{tmp_path}"
    refuses(DataError, r"has no config\.json, so it holds no model of transformers", load_model, name)
    vit(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:1000])
    refuses(DataError, "the weights of hf:.* could not be loaded", load_model, name)
    (tmp_path / "model.safetensors").unlink()
    refuses(DataError, r"holds no weights, model\.safetensors or pytorch_model\.bin", load_model, name)
    (tmp_path / "model.safetensors").write_bytes(weights)
    change_config(tmp_path, num_hidden_layers=3)
    refuses(
        DataError, r"do not fit a ViTForImageClassification: \d+ missing or of another shape \(vit\.", load_model, name
    )
    change_config(tmp_path, model_type="bert")
    refuses(DataError, "is of type bert; transformers has no image classifier of this type", load_model, name)


def test_a_model_that_brings_code_runs_none(tmp_path, capsys):
    vit(tmp_path)
    (tmp_path / "mine.py").write_text("print('code of the model runs')")
    change_config(tmp_path, model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"})
    refuses(DataError, "brings code of its own, which visionattn does not run", load_model, f"hf:{tmp_path}")
    assert "runs" not in capsys.readouterr().out
