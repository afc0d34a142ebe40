"""What a page is told, against the model's own numbers; what it refuses; how large it gets."""

import json
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tests.overlay.explored import CLASSES, HOSTILE, PREPROCESS, photo, vit, weights_of
from tests.overlay.test_packing import array, numbers, rows_of
from visionattn import insert
from visionattn.attention import CBAM
from visionattn.cli import main
from visionattn.data.placement import Preprocess
from visionattn.errors import DataError, UsageError
from visionattn.maps import METHODS, CentreGaussian, Edges, RandomMap, RawAttention, capture, deletion, insertion
from visionattn.models import ConvNet
from visionattn.overlay.explorer import explore


def facts(page):
    return json.loads(re.search(r'<script type="application/json" id="facts">(.*?)</script>', page.html, re.S)[1])


def content(page, image=0):
    return numbers(re.search(rf'id="numbers-{image}">([^<]*)<', page.html)[1])


def weights_told(page, layer, image=0):
    """(W, H, Q, K) of a layer, its keys in the order of the page, and their cells."""
    told = facts(page)["pictures"][image]["attention"][layer]
    parts = [rows_of(content(page, image), part)[0] for part in told["rows"]]
    windows, queries = told["queries"]["shape"]
    shape = windows, told["heads"], queries, -1
    return np.concatenate(parts, 1).reshape(shape), array(content(page, image), told["keys"])


def test_every_weight_of_a_vit_is_told():
    model, picture = vit(), photo()
    page = explore(model, [picture], preprocess=PREPROCESS, steps=0)
    assert page.levels == 256
    weights = weights_of(model, picture)
    for layer in range(3):
        told_1HQK, cells_1K = weights_told(page, layer)
        assert cells_1K.tolist() == [[*range(12), -1]]  # the class token behind the patches
        order = [*range(1, 13), 0]
        np.testing.assert_allclose(told_1HQK[0], weights[layer][:, order][:, :, order], atol=0.003)


def test_windows_are_told_window_by_window():
    import timm

    torch.manual_seed(0)
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", img_size=56, embed_dim=24, depths=(2,), num_heads=(2,), num_classes=3
    ).eval()
    picture = photo(56, 56)
    preprocess = Preprocess(56)
    with torch.no_grad(), capture(model, _full()) as records:
        model(torch.from_numpy(preprocess(picture)[0])[None])
    page = explore(model, [picture], preprocess=preprocess, steps=0, methods={"raw": RawAttention()})
    for layer, record in enumerate(records.attention):
        told_WHQK, cells_WK = weights_told(page, layer)
        np.testing.assert_array_equal(cells_WK, record.keys.index_WN.numpy())
        np.testing.assert_allclose(told_WHQK, record.weights[0].numpy(), atol=0.003)


def _full():
    from visionattn.maps import Full

    return Full()


def test_coarser_numbers_until_the_page_fits_and_their_error_is_bounded():
    model, pictures = vit(depth=4), [photo(seed=seed) for seed in range(5)]
    options = {"preprocess": PREPROCESS, "steps": 0, "methods": {"raw": RawAttention()}}
    fine = explore(model, pictures, **options)
    limit = len(fine.html) - 2_000
    page = explore(model, pictures, limit=limit, **options)
    assert len(page.html.encode()) <= limit
    assert 3 <= page.levels < 256
    for image, picture in enumerate(pictures):
        weights = weights_of(model, picture)
        for layer in range(4):
            told_1HQK, _ = weights_told(page, layer, image)
            rows = weights[layer][:, [*range(1, 13), 0]][:, :, 1:]
            span = rows.max(-1, keepdims=True) - rows.min(-1, keepdims=True) + 0.005 * rows.max(-1, keepdims=True)
            assert (np.abs(told_1HQK[0, :, :, :12] - rows) <= span * 0.75 / (page.levels - 1) * 1.001 + 1e-6).all()
    with pytest.raises(UsageError, match=r"limit is .* MB; explore fewer images"):
        explore(model, pictures, limit=limit // 4, **options)


def test_gates_are_told_with_the_features_that_they_weigh():
    torch.manual_seed(0)
    model = ConvNet(4, widths=(16, 32))
    insert(model, CBAM, preserve=False)
    model.eval()
    picture = photo()
    seen = {}
    for number, block in enumerate(model.blocks):
        mechanism = block.inserted.mechanism
        mechanism.register_forward_hook(lambda module, args, out, number=number: seen.update({number: args[0]}))
    with torch.no_grad():
        model(torch.from_numpy(PREPROCESS(picture)[0])[None])
    page = explore(model, [picture], preprocess=PREPROCESS, steps=0, methods={"gate": METHODS["gate"]()})
    gates = facts(page)["pictures"][0]["gates"]
    assert {gate["kind"] for gate in gates} == {"spatial", "channel"}
    for number, gate in enumerate(gate for gate in gates if gate["kind"] == "channel"):
        assert gate["name"] == f"blocks.{number}.attention.channel"
        weights_C = array(content(page), gate["weights"])
        features = seen[number][0]
        with torch.no_grad():
            out = model.blocks[number].inserted.mechanism.attention.channel(seen[number])[0]  # features · weight
        np.testing.assert_allclose(weights_C, (out.flatten(1).sum(1) / features.flatten(1).sum(1)).numpy(), rtol=1e-3)
        assert gate["channels"] == np.argsort(-weights_C, kind="stable")[:8].tolist()
        for channel, told in zip(gate["channels"], gate["features"], strict=True):
            span = told["high"] - told["low"]
            map_hw = told["low"] + array(content(page), told["codes"]) / 255 * span
            np.testing.assert_allclose(map_hw, features[channel].numpy(), atol=span / 509)


def test_curves_and_the_verdict_are_those_of_this_image():
    model, picture = vit(), photo()
    values = torch.from_numpy(PREPROCESS(picture)[0])[None]
    method = RawAttention()
    page = explore(model, [picture], preprocess=PREPROCESS, steps=5, methods={"raw": method})
    told = {heatmap["name"]: heatmap for heatmap in facts(page)["pictures"][0]["heatmaps"]}
    assert list(told) == ["raw", "random 3×4", "centre", "edges 3×4"]
    makers = {"raw": method, "random 3×4": RandomMap((3, 4)), "centre": CentreGaussian(), "edges 3×4": Edges((3, 4))}
    areas = {}
    for name, maker in makers.items():
        heatmaps = maker(model, values).heatmaps
        for figure, curve in (("deletion", deletion), ("insertion", insertion)):
            expected = curve(model, values, heatmaps, steps=5)
            np.testing.assert_allclose(told[name]["curves"][figure]["scores"], expected.scores[0], atol=1e-5)
            areas[name, figure] = float(expected.auc)
            assert told[name]["curves"][figure]["area"] == pytest.approx(areas[name, figure], abs=1e-5)
    for figure, sign in (("deletion", -1), ("insertion", 1)):
        lost = [n for n in list(makers)[1:] if sign * (areas["raw", figure] - areas[n, figure]) <= 0]
        assert told["raw"]["unbeaten"].get(figure, []) == lost
    with torch.no_grad():
        probabilities = model(values).softmax(1)[0]
    for index, share in facts(page)["pictures"][0]["answer"]:
        assert share == pytest.approx(float(probabilities[index]), abs=1e-5)


def test_the_model_is_left_as_it_was():
    model = vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    explore(model, torch.randn(1, 3, 48, 64), steps=2, methods={"raw": RawAttention()})
    assert all(module.training for module in model.modules())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_glimpses_and_boxes_need_no_model():
    random = np.random.default_rng(0)
    glimpses = {
        "locations": random.uniform(0, 50, (3, 2)),
        "boxes": random.uniform(0, 50, (3, 2, 4)),
        "patches": random.integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8),
        "probabilities": random.dirichlet(np.ones(4), 3),
    }
    boxes = {"boxes": [[1, 2, 30, 40]], "labels": [2], "scores": [0.75], "maps": random.random((1, 5, 6))}
    options = {"preprocess": Preprocess(32), "glimpses": [glimpses], "detections": [boxes], "class_names": CLASSES}
    page = explore(None, [photo()], **options)
    told = facts(page)["pictures"][0]
    np.testing.assert_allclose(told["glimpses"]["locations"], glimpses["locations"], atol=0.006)
    classes = told["glimpses"]["classes"]
    np.testing.assert_allclose(told["glimpses"]["probabilities"], glimpses["probabilities"][:, classes], atol=1e-5)
    assert told["detections"]["labels"] == [2]
    assert facts(page)["classes"]["2"] == "cup"
    for name, short in (("locations", glimpses["locations"][:2]), ("boxes", glimpses["boxes"][..., :2])):
        with pytest.raises(UsageError, match="glimpses are locations"):
            explore(None, [photo()], preprocess=Preprocess(32), glimpses=[{**glimpses, name: short}])
    more = {**boxes, "maps": random.random((2, 5, 6))}
    with pytest.raises(UsageError, match="1 boxes, 1 labels, 1 scores and 2 maps"):
        explore(None, [photo()], preprocess=Preprocess(32), detections=[more])
    with pytest.raises(UsageError, match="1 glimpses for 2 images"):
        explore(None, [photo()] * 2, preprocess=Preprocess(32), glimpses=[glimpses])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images"),
        (torch.zeros(3, 48, 64), "images must be"),
        ("cat.png", "a list of files"),
        ([np.zeros((4, 4), np.uint8)], "uint8 RGB"),
    ],
)
def test_wrong_images_are_told(images, message):
    with pytest.raises(UsageError, match=message):
        explore(vit(), images, preprocess=PREPROCESS)


def test_what_cannot_be_explored_is_told():
    class Plain(nn.Module):
        def forward(self, x):
            return F.relu(x).mean((2, 3))

    with pytest.raises(UsageError, match="nothing to show of this Plain"):
        explore(Plain(), torch.randn(1, 3, 8, 8), methods={}, steps=0)
    with pytest.raises(UsageError, match="pass preprocess="):
        explore(Plain(), [photo()])
    with pytest.raises(UsageError, match="2 class names, and the model has 4"):
        explore(vit(), [photo()], preprocess=PREPROCESS, class_names=("a", "b"), steps=0)
    with pytest.raises(UsageError, match="steps must be"):
        explore(vit(), [photo()], preprocess=PREPROCESS, steps=1)


def test_a_broken_file_does_not_stop_the_others(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    options = {"preprocess": PREPROCESS, "steps": 0, "methods": {"raw": RawAttention()}}
    page = explore(vit(), [tmp_path / "bad.png", tmp_path / "good.png"], **options)
    assert (page.images, [name for name, _ in page.failures]) == (1, ["bad.png"])
    assert facts(page)["pictures"][0]["name"] == "good.png"
    assert str(tmp_path) not in page.html  # where a user's files lie stays at home
    with pytest.raises(DataError, match="none of the 1 images can be read"):
        explore(vit(), [tmp_path / "bad.png"], **options)


def test_a_method_that_does_not_fit_is_told():
    methods = {"raw": RawAttention(), "gate": METHODS["gate"]()}
    page = explore(vit(), [photo()], preprocess=PREPROCESS, steps=0, methods=methods)
    assert list(page.left_out) == ["gate"]
    assert "gate needs gates over positions" in page.left_out["gate"]
    assert facts(page)["pictures"][0]["failed"] == page.left_out


def test_a_notebook_shows_the_whole_page_in_a_frame():
    page = explore(vit(), torch.randn(1, 3, 48, 64), steps=0, methods={"raw": RawAttention()}, class_names=CLASSES)
    shown = page._repr_html_()
    frame = re.fullmatch(r'<iframe sandbox="allow-scripts" [^<>]*? srcdoc="([^"<>]*)"></iframe>', shown)
    import html

    assert html.unescape(frame[1]) == page.html


def test_markup_in_names_never_leaves_the_data():
    page = explore(
        vit(), [photo()], preprocess=PREPROCESS, steps=0, class_names=CLASSES, model_name=HOSTILE,
        methods={"raw": RawAttention()},
    )  # fmt: skip
    assert "<img src=x" not in page.html
    assert page.html.count("</script>") == 3
    assert facts(page)["model"] == HOSTILE


def test_from_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number in range(5):
        Image.fromarray(photo(seed=number)).save(f"{number}.png")
    (tmp_path / "bad.jpg").write_bytes(b"")
    call = ["explore", "--images", ".", "--model", "test_vit", "--weights", "random", "--method", "raw", "--steps", "2"]
    assert main([*call, "--out", "seen.html", "--count", "3"]) == 0
    assert "seen.html" in (told := capsys.readouterr().out)
    assert "3 images of 6, taken evenly" in told
    assert main([*call, "--out", "seen.html"]) == 1  # its own page is written over; an image failed
    assert "bad.jpg" in capsys.readouterr().out
    (tmp_path / "mine.html").write_text("mine")
    assert main([*call, "--out", "mine.html"]) == 2
    assert "choose another name" in capsys.readouterr().err
    assert (tmp_path / "mine.html").read_text() == "mine"
    assert main([*call, "--out", "x.html", "--steps", "1"]) == 2
    assert main([*call, "--out", "none/x.html"]) == 1
