"""The manifest records the model's predictions, and the layer, peak and target of each method's heatmap."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image

from tests.overlays.folder.exports import Tiny, bright, manifest, noise, other_weights, photos, run
from visionattn.data.placement import Preprocess
from visionattn.drawing.rendering import peak
from visionattn.errors import UsageError
from visionattn.maps.cam import GradCAM
from visionattn.overlays.explainer import Explainer

CLASSES = ("cat", "dog", "owl")


@pytest.mark.parametrize("method", [bright, GradCAM()])
def test_prediction_and_probability_are_those_of_a_plain_forward(tmp_path, method):
    photos(tmp_path / "in")
    run([tmp_path / "in"], tmp_path / "out", method=method, class_names=CLASSES, target=1)
    model = Tiny().eval()
    for name, entry in manifest(tmp_path / "out").items():
        tensor, _ = Preprocess(16)(np.array(Image.open(tmp_path / "in" / name)))
        probabilities = model(torch.from_numpy(tensor)[None])[0].softmax(0).detach()
        assert entry["prediction"] == int(probabilities.argmax())
        assert entry["class"] == CLASSES[entry["prediction"]]
        assert entry["probability"] == pytest.approx(float(probabilities.max()), abs=2e-6)
        assert entry["target"] == (1 if method is not bright else None)


def test_a_timm_transformer_gets_raw_attention_by_default(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    photos(tmp_path / "in", 2)
    run([tmp_path / "in"], tmp_path / "out", model=model, preprocess=Preprocess(32), method=None)
    entry = manifest(tmp_path / "out")["0.png"]
    tensor, _ = Preprocess(32)(noise(20, 30, 0))
    probabilities = model.eval()(torch.from_numpy(tensor)[None])[0].softmax(0).detach()
    assert (entry["prediction"], entry["method"]) == (int(probabilities.argmax()), "raw")
    assert entry["probability"] == pytest.approx(float(probabilities.max()), abs=2e-6)


def dark(model, images_BCHW, *, target=None):
    maps = bright(model, images_BCHW)
    return dataclasses.replace(maps, heatmaps=1 - maps.heatmaps, method="dark")


def test_the_manifest_has_the_facts_of_each_of_several_methods(tmp_path):
    photos(tmp_path / "in", 4)
    model = Tiny()
    explainers = [
        Explainer(model, Preprocess(16), bright, CLASSES, "tiny", "bright"),
        Explainer(model, Preprocess(24), dark, CLASSES, "tiny", "dark"),
    ]
    run([tmp_path / "in"], tmp_path / "out", explainers=explainers, save=("overlay", "array"))
    entry = manifest(tmp_path / "out")["0.png"]
    first, second = entry["explanations"]
    assert (first["name"], second["name"]) == ("bright", "dark")
    for key in ("model", "method", "layer", "prediction", "class", "probability", "peak"):
        assert entry[key] == first[key]
    tensor, placement = Preprocess(24)(noise(20, 30, 0))
    heatmap = 1 - bright(model, torch.from_numpy(tensor)[None]).heatmaps[0].numpy()
    assert second["peak"] == [round(place, 1) for place in peak(heatmap, placement)]
    arrays = np.load(tmp_path / "out" / "0.png.array.npz")
    np.testing.assert_allclose(arrays["dark/heatmap"], heatmap, atol=1e-6)
    assert run([tmp_path / "in"], tmp_path / "out", explainers=explainers, save=("overlay", "array")).skipped == 4
    assert run([tmp_path / "in"], tmp_path / "out", explainers=explainers[::-1]).written == 4
    with pytest.raises(UsageError, match="needs a name of its own"):
        run([tmp_path / "in"], tmp_path / "out", explainers=[explainers[0], explainers[0]])
    with pytest.raises(UsageError, match="compare needs two explainers, got 1"):
        run([tmp_path / "in"], tmp_path / "out", compare=True)


def test_two_models_are_compared_where_they_differ(tmp_path):
    photos(tmp_path / "in", 3)
    explainers = [
        Explainer(Tiny(), Preprocess(16), bright, name="old"),
        Explainer(other_weights(), Preprocess(16), dark, name="new"),
    ]
    run([tmp_path / "in"], tmp_path / "out", explainers=explainers, compare=True, save=("overlay", "difference"))
    for name, entry in manifest(tmp_path / "out").items():
        tensor, placement = Preprocess(16)(np.array(Image.open(tmp_path / "in" / name)))
        heatmap = bright(Tiny(), torch.from_numpy(tensor)[None]).heatmaps[0].numpy()
        apart = np.abs(1 - 2 * placement.carry(heatmap))[placement.seen()]
        assert entry["difference"]["mean"] == pytest.approx(apart.mean(), abs=1e-4)
        x, y = entry["difference"]["peak"]
        assert np.abs(1 - 2 * placement.carry(heatmap)[int(y), int(x)]) == pytest.approx(apart.max(), abs=1e-4)
        assert [look["name"] for look in entry["explanations"]] == ["old", "new"]


def test_a_target_may_be_a_class_name_and_an_unknown_one_is_refused(tmp_path):
    photos(tmp_path / "in", 2)
    options = {"method": GradCAM(), "class_names": CLASSES}
    run([tmp_path / "in"], tmp_path / "out", target="owl", **options)
    assert manifest(tmp_path / "out")["0.png"]["target"] == 2
    with pytest.raises(UsageError, match=r"no class 'oul'\. Nearest: owl"):
        run([tmp_path / "in"], tmp_path / "out", target="oul", **options)


def test_half_precision_runs_the_model_in_bfloat16_and_changes_the_fingerprint(tmp_path):
    photos(tmp_path / "in", 2)
    seen = []
    model = Tiny()
    model.conv.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    run([tmp_path / "in"], tmp_path / "out", model=model)
    whole = manifest(tmp_path / "out")["0.png"]
    assert run([tmp_path / "in"], tmp_path / "out", model=model, bf16=True).written == 2
    half = manifest(tmp_path / "out")["0.png"]
    assert seen == [torch.float32, torch.bfloat16]
    assert half["probability"] == pytest.approx(whole["probability"], abs=0.02)
