"""The data of an explorer page equals the values that the model, methods and metrics compute."""

import numpy as np
import pytest
import torch

from tests.explorer.explored import PREPROCESS, photo, vit, weights_of
from tests.explorer.pages import content, facts, weights_on_page
from tests.explorer.unpacked import array
from visionattn.attention import CBAM, insert
from visionattn.capture import FullAttention, capture
from visionattn.data.placement import Preprocess
from visionattn.evaluation import CentreGaussian, Edges, RandomMap, deletion, insertion
from visionattn.explorer.analysis import NOISE, _compared
from visionattn.explorer.explorer import explore
from visionattn.maps import METHODS, RawAttention
from visionattn.models import ConvNet


def test_page_has_every_attention_weight_of_a_vit():
    model, picture = vit(), photo()
    page = explore(model, [picture], preprocess=PREPROCESS, steps=0)
    assert page.levels == 256
    weights = weights_of(model, picture)
    for layer in range(3):
        found_1HQK, cells_1K = weights_on_page(page, layer)
        assert cells_1K.tolist() == [[*range(12), -1]]  # the class token comes after the patches
        order = [*range(1, 13), 0]  # timm's order starts with the class token
        np.testing.assert_allclose(found_1HQK[0], weights[layer][:, order][:, :, order], atol=0.003)


def test_page_has_the_weights_of_windowed_attention():
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2,), num_heads=(2,), num_classes=3
    ).eval()
    picture = photo(56, 56)
    preprocess = Preprocess(56)
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(torch.from_numpy(preprocess(picture)[0])[None])
    page = explore(model, [picture], preprocess=preprocess, steps=0, methods={"raw": RawAttention()})
    for layer, record in enumerate(records.attention):
        found_WHQK, cells_WK = weights_on_page(page, layer)
        np.testing.assert_array_equal(cells_WK, record.keys.index_WN.numpy())
        np.testing.assert_allclose(found_WHQK, record.weights[0].numpy(), atol=0.003)


def test_page_has_gates_with_the_features_that_they_multiply():
    torch.manual_seed(0)
    model = ConvNet(4, widths=(16, 32))
    insert(model, CBAM, preserve=False)
    model.eval()
    picture = photo()
    inputs = {}  # block → the features before its mechanism
    for number, block in enumerate(model.blocks):
        mechanism = block.inserted.mechanism
        mechanism.register_forward_hook(lambda module, args, out, number=number: inputs.update({number: args[0]}))
    with torch.no_grad():
        model(torch.from_numpy(PREPROCESS(picture)[0])[None])
    page = explore(model, [picture], preprocess=PREPROCESS, steps=0, methods={"gate": METHODS["gate"]()})
    gates = facts(page)["pictures"][0]["gates"]
    assert {gate["kind"] for gate in gates} == {"spatial", "channel"}
    for number, gate in enumerate(gate for gate in gates if gate["kind"] == "channel"):
        assert gate["name"] == f"blocks.{number}.attention.channel"
        weights_C = array(content(page), gate["weights"])
        features = inputs[number][0]
        with torch.no_grad():
            out = model.blocks[number].inserted.mechanism.attention.channel(inputs[number])[0]  # features · weight
        np.testing.assert_allclose(weights_C, (out.flatten(1).sum(1) / features.flatten(1).sum(1)).numpy(), rtol=1e-3)
        assert gate["channels"] == np.argsort(-weights_C, kind="stable")[:8].tolist()
        for channel, encoded in zip(gate["channels"], gate["features"], strict=True):
            span = encoded["high"] - encoded["low"]
            map_hw = encoded["low"] + array(content(page), encoded["codes"]) / 255 * span
            np.testing.assert_allclose(map_hw, features[channel].numpy(), atol=span / 509)  # about half a level


def test_curves_equal_the_metrics_and_are_compared_with_each_control():
    model, picture = vit(), photo()
    values = torch.from_numpy(PREPROCESS(picture)[0])[None]
    method = RawAttention()
    page = explore(model, [picture], preprocess=PREPROCESS, steps=5, methods={"raw": method})
    shown = {heatmap["name"]: heatmap for heatmap in facts(page)["pictures"][0]["heatmaps"]}
    assert list(shown) == ["raw", "random 3×4", "centre", "edges 3×4"]
    methods = {"raw": method, "random 3×4": RandomMap((3, 4)), "centre": CentreGaussian(), "edges 3×4": Edges((3, 4))}
    areas = {}
    for name, method_or_control in methods.items():
        heatmaps = method_or_control(model, values).heatmaps
        for metric, curve in (("deletion", deletion), ("insertion", insertion)):
            expected = curve(model, values, heatmaps, steps=5)
            np.testing.assert_allclose(shown[name]["curves"][metric]["scores"], expected.scores[0], atol=1e-5)
            areas[name, metric] = float(expected.auc)
            assert shown[name]["curves"][metric]["area"] == pytest.approx(areas[name, metric], abs=1e-5)
    for metric, sign in (("deletion", -1), ("insertion", 1)):
        expected = {"better": [], "same": [], "worse": []}
        for name in list(methods)[1:]:
            ahead = sign * (areas["raw", metric] - areas[name, metric])
            expected["same" if abs(ahead) < NOISE else "better" if ahead > 0 else "worse"].append(name)
        assert shown["raw"]["compared"][metric] == expected
        assert shown["centre"]["compared"] == {}
    with torch.no_grad():
        probabilities = model(values).softmax(1)[0]
    for index, probability in facts(page)["pictures"][0]["answer"]:
        assert probability == pytest.approx(float(probabilities[index]), abs=1e-5)


def test_small_differences_on_one_image_count_as_the_same():
    curves = {
        "m": {"deletion": (0.5, 0.5), "insertion": (0.5, 0.5)},
        "centre": {"deletion": (0.55, 0.55), "insertion": (0.9, 0.9)},
        "edges": {"deletion": (0.61, 0.61), "insertion": (0.5, 0.5)},
    }
    assert _compared(curves, "m", ["centre", "edges"]) == {
        "deletion": {"better": ("edges",), "same": ("centre",), "worse": ()},
        "insertion": {"better": (), "same": ("edges",), "worse": ("centre",)},
    }
    assert _compared(curves, "centre", []) == {}
    assert _compared({}, "m", []) == {}
