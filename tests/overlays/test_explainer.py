"""Explainers: their predictions and heatmaps as the manifest records them, and their fingerprints."""

import dataclasses
import json
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from tests.overlays.folder.exports import Tiny, bright, manifest, noise, other_weights, photos, run
from visionattn.attention import TokenMerging, Windowed, reduce_tokens, swap_attention
from visionattn.data.placement import Preprocess
from visionattn.drawing import Style, peak
from visionattn.errors import UsageError
from visionattn.maps.methods.cam import GradCAM
from visionattn.overlays.explainer import Explainer, describe, fingerprint_of, weights_hash

CLASSES = ("cat", "dog", "owl")


@pytest.mark.parametrize("method", [bright, GradCAM()])
def test_the_manifest_has_the_prediction_and_probability_of_a_forward_pass(tmp_path, method):
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


def test_the_default_method_of_a_timm_vit_is_rollout(tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    photos(tmp_path / "in", 2)
    run([tmp_path / "in"], tmp_path / "out", model=model, preprocess=Preprocess(32), method=None)
    entry = manifest(tmp_path / "out")["0.png"]
    tensor, _ = Preprocess(32)(noise(20, 30, 0))
    probabilities = model.eval()(torch.from_numpy(tensor)[None])[0].softmax(0).detach()
    assert (entry["prediction"], entry["method"]) == (int(probabilities.argmax()), "rollout")
    assert entry["probability"] == pytest.approx(float(probabilities.max()), abs=2e-6)


def dark(model, images_BCHW, *, target=None):
    """The inverse of `bright`."""
    maps = bright(model, images_BCHW)
    return dataclasses.replace(maps, heatmaps=1 - maps.heatmaps, method="dark")


def test_the_manifest_has_the_facts_of_every_method(tmp_path):
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


def test_a_comparison_records_the_mean_and_the_point_of_the_largest_difference(tmp_path):
    photos(tmp_path / "in", 3)
    explainers = [
        Explainer(Tiny(), Preprocess(16), bright, name="old"),
        Explainer(other_weights(), Preprocess(16), dark, name="new"),
    ]
    run([tmp_path / "in"], tmp_path / "out", explainers=explainers, compare=True, save=("overlay", "difference"))
    for name, entry in manifest(tmp_path / "out").items():
        tensor, placement = Preprocess(16)(np.array(Image.open(tmp_path / "in" / name)))
        heatmap = bright(Tiny(), torch.from_numpy(tensor)[None]).heatmaps[0].numpy()
        difference = np.abs(1 - 2 * placement.carry(heatmap))[placement.seen()]
        assert entry["difference"]["mean"] == pytest.approx(difference.mean(), abs=1e-4)
        x, y = entry["difference"]["peak"]
        assert np.abs(1 - 2 * placement.carry(heatmap)[int(y), int(x)]) == pytest.approx(difference.max(), abs=1e-4)
        assert [explained["name"] for explained in entry["explanations"]] == ["old", "new"]


def test_a_target_may_be_a_class_name_and_unknown_names_are_refused(tmp_path):
    photos(tmp_path / "in", 2)
    options = {"method": GradCAM(), "class_names": CLASSES}
    run([tmp_path / "in"], tmp_path / "out", target="owl", **options)
    assert manifest(tmp_path / "out")["0.png"]["target"] == 2
    with pytest.raises(UsageError, match=r"no class 'oul'\. Nearest: owl"):
        run([tmp_path / "in"], tmp_path / "out", target="oul", **options)


def test_a_target_of_digits_is_an_index_and_is_refused_if_it_also_names_another_class(tmp_path):
    photos(tmp_path / "in", 2)
    options = {"method": GradCAM(), "class_names": ("1", "2", "owl")}
    for number, target in enumerate((0, 1, "0")):
        run([tmp_path / "in"], tmp_path / str(number), target=target, **options)
        assert manifest(tmp_path / str(number))["0.png"]["target"] == int(target)
    with pytest.raises(UsageError, match=r"'1' is either class number 1, which is named '2', or .* without quotes"):
        run([tmp_path / "in"], tmp_path / "out", target="1", **options)
    lines = ({"path": "0.png", "target": 1}, {"path": "1.png", "target": "1"})
    (tmp_path / "in" / "list.jsonl").write_text("\n".join(map(json.dumps, lines)))
    run([tmp_path / "in" / "list.jsonl"], tmp_path / "listed", **options)
    assert manifest(tmp_path / "listed")["0.png"]["target"] == 1
    assert "'1' is either class number 1" in manifest(tmp_path / "listed")["1.png"]["reason"]


def test_bf16_runs_the_model_in_bfloat16_and_changes_the_fingerprint(tmp_path):
    photos(tmp_path / "in", 2)
    dtypes = []
    model = Tiny()
    model.conv.register_forward_hook(lambda module, args, out: dtypes.append(out.dtype))
    run([tmp_path / "in"], tmp_path / "out", model=model)
    float32 = manifest(tmp_path / "out")["0.png"]
    assert run([tmp_path / "in"], tmp_path / "out", model=model, bf16=True).written == 2
    bfloat16 = manifest(tmp_path / "out")["0.png"]
    assert dtypes == [torch.float32, torch.bfloat16]
    assert bfloat16["probability"] == pytest.approx(float32["probability"], abs=0.02)


def test_different_values_have_different_descriptions_without_memory_addresses():
    values = [
        np.zeros(2), np.ones(2), np.float32(0.5), np.float32(0.25), Path("a"), Path("b"), partial(bright, contrast=1),
        partial(bright, contrast=2), bright, GradCAM(), GradCAM(layer="conv"), torch.zeros(2), Tiny(), other_weights(),
        {"a": 1}, {"a": 2}, [1, 2], None, True, "a", Style(), Style(alpha=0.5), Preprocess(8), Preprocess(9), {1}, {2},
    ]  # fmt: skip
    described = [json.dumps(describe(value)) for value in values]
    assert len(set(described)) == len(values)
    assert not [text for text in described if "0x" in text]  # a memory address would differ in every process


def test_buffers_of_different_shapes_and_dtypes_have_different_hashes():
    class Buffers(nn.Module):
        def __init__(self, *tensors):
            super().__init__()
            for number, tensor in enumerate(tensors):
                self.register_buffer(f"b{number}", tensor)

    kinds = [torch.zeros(0), torch.tensor(3), torch.tensor([True]), torch.ones(2).bfloat16(), torch.ones(3, 2).T]
    hashes = [weights_hash(Buffers(kind)) for kind in kinds]
    assert len(set(hashes)) == len(kinds)
    assert weights_hash(Buffers(torch.ones(3, 2).T.contiguous())) == hashes[-1]


def windowed(window):
    model = timm.create_model("test_vit", img_size=64)
    swap_attention(model, partial(Windowed, window=window))
    return model


def reduced(count):
    model = timm.create_model("test_vit", img_size=64)
    reduce_tokens(model, TokenMerging(count))
    return model


def hooked(value):
    model = Tiny()
    model.register_forward_hook(lambda module, args, out: out * value)
    return model


def patched(value):
    model = Tiny()
    model.forward = partial(multiplied, model, value)
    return model


def multiplied(model, value, x):
    return value * Tiny.forward(model, x)


@pytest.mark.parametrize(
    ("build", "values"), [(windowed, (2, 4)), (reduced, (2, 4)), (hooked, (1, 2)), (patched, (1, 2))]
)
def test_fingerprint_shows_a_change_that_is_neither_module_nor_weight(build, values):
    def fingerprint(value):
        torch.manual_seed(0)
        return fingerprint_of([Explainer(build(value), Preprocess(64), GradCAM())])

    first, second = map(fingerprint, values)
    assert first != second
    assert fingerprint(values[0]) == first
    assert first != fingerprint_of([Explainer(Tiny(), Preprocess(64), GradCAM())])


def test_fingerprint_shows_a_change_of_the_interpolation():
    explainers = [Explainer(Tiny(), Preprocess(64), GradCAM())]
    styles = [Style(interpolation=interpolation) for interpolation in ("nearest", "linear", "smooth")]
    assert len({fingerprint_of(explainers, style=style) for style in styles}) == 3
    assert fingerprint_of(explainers, style=Style()) == fingerprint_of(explainers, style=styles[2])


def test_fingerprint_is_equal_in_another_process_and_after_use():
    script = (
        "import timm, torch; torch.manual_seed(0)\n"
        "from visionattn.attention import *; from functools import partial\n"
        "m = timm.create_model('test_vit', img_size=64); reduce_tokens(m, TokenMerging(2))\n"
        "from visionattn.overlays.explainer import weights_hash; print(weights_hash(m))\n"
        "from visionattn.maps import Rollout; m.eval(); Rollout()(m, torch.rand(1, 3, 64, 64)); print(weights_hash(m))"
    )
    command = [sys.executable, "-W", "ignore", "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    torch.manual_seed(0)
    assert ran == [weights_hash(reduced(2))] * 2
