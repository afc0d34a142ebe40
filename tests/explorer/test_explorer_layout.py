"""The page's layout and labels: names that wrap, named curves, stretched scales, and controls above the picture."""

import itertools

import numpy as np
import pytest
import torch

from tests.explorer.explored import PREPROCESS, needs_browser, opened, photo, settle, vit, weights_of
from visionattn.attention import CBAM, insert
from visionattn.capture import capture
from visionattn.explorer.explorer import explore
from visionattn.maps import Gate, RawAttention, Rollout
from visionattn.models import ConvNet

pytestmark = needs_browser

LONG = "American Staffordshire terrier, Staffordshire terrier, American pit bull terrier, pit bull terrier"
PHONE = {"viewport": {"width": 390, "height": 844}}
DESKTOP = {"viewport": {"width": 1280, "height": 860}}


@pytest.fixture(scope="module")
def model():
    return vit()


@pytest.fixture(scope="module")
def html(model):
    methods = {"raw": RawAttention(), "rollout": Rollout()}
    names = ["owl", LONG, "cup", "rose"]
    return explore(model, [photo()], preprocess=PREPROCESS, methods=methods, class_names=names, steps=3).html


def top(page, selector):
    return page.locator(selector).first.bounding_box()["y"]


def test_layer_and_head_controls_stand_above_the_picture_on_a_phone(browser, html, tmp_path):
    with opened(browser, html, tmp_path, **PHONE) as page:
        for control in ("#views", "[aria-label=Layer]", "[aria-label=Heads]", "button.whole"):
            assert top(page, control) < top(page, "#picture"), control
        assert top(page, "#picture") + page.locator("#picture").bounding_box()["height"] < 844  # seen without scrolling
        page.get_by_label("Layer", exact=True).fill("1")
        page.get_by_label("Heads", exact=True).select_option("2")
        settle(page)
        assert page.locator("#readout").text_content().startswith("Class token, layer 1, head 3: ")
    with opened(browser, html, tmp_path, **DESKTOP) as page:
        stage = page.locator("#stage").bounding_box()
        for part in ("#answer", "#views", "#controls", "#panel"):  # one below the other, to the right of the picture
            assert page.locator(part).bounding_box()["x"] > stage["x"] + stage["width"]
        tops = [top(page, part) for part in ("#answer", "#views", "#controls", "#panel")]
        assert tops == sorted(tops)
        assert top(page, "#answer") == pytest.approx(stage["y"], abs=20)


@pytest.mark.parametrize("context", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_long_class_names_wrap(browser, html, tmp_path, context):
    with opened(browser, html, tmp_path, **context) as page:
        name = page.locator("#answer .name", has_text="Staffordshire")
        assert name.text_content() == LONG
        assert name.evaluate("(one) => one.scrollWidth <= one.clientWidth && one.scrollHeight <= one.clientHeight + 1")
        boxes = [page.locator("#answer li").nth(at).bounding_box() for at in range(4)]
        assert all(a["y"] + a["height"] <= b["y"] + 0.5 for a, b in itertools.pairwise(boxes))


def test_curves_of_the_controls_are_named_by_their_dashes(browser, html, tmp_path):
    with opened(browser, html, tmp_path) as page:
        page.locator("input[value=heatmaps]").check(force=True)
        settle(page)
        names = page.locator(".names span").all_text_contents()
        assert names[0] == "raw"
        assert set(names[1:]) == {"centre", "random 3×4", "edges 3×4"}
        dashes = page.locator(".names path.control").evaluate_all(
            "(all) => all.map((one) => one.getAttribute('stroke-dasharray'))"
        )
        assert len(set(dashes)) == 3
        drawn = page.locator(".curves svg").first.locator("polyline.control")
        points = "(all) => all.map((one) => [one.getAttribute('stroke-dasharray'), one.getAttribute('points')])"
        for dash, line in drawn.evaluate_all(points):
            name = names[1 + dashes.index(dash)]
            scores = page.evaluate(f"picture().heatmaps.find((one) => one.name === '{name}').curves.deletion.scores")
            heights = np.array([float(point.split(",")[1]) for point in line.split()])
            shown = "picture().heatmaps.filter((one) => one.name !== 'rollout')"
            top_score = page.evaluate(f"Math.max(...{shown}.flatMap((one) => one.curves.deletion.scores))")
            np.testing.assert_allclose(heights, 90 * (1 - np.array(scores) / top_score), atol=0.06)


def is_stretched(values, end=None):
    low, high = values.min(), values.max()
    return high - low < 0.9 * (max(high, high if end is None else end) - min(low, 0))


def test_page_says_where_the_scale_of_attention_or_of_a_heatmap_is_stretched(browser, tmp_path):
    found = set()
    for flatness in (1, 25):  # timm's random attention is nearly uniform
        model = vit()
        for block in model.blocks:
            block.attn.qkv.weight.data *= flatness / 25
        weights = weights_of(model, photo())[:, :, 0, 1:]
        methods = {"raw": RawAttention(), "rollout": Rollout()}
        html = explore(model, [photo()], preprocess=PREPROCESS, methods=methods, steps=0).html
        raw = {
            name: method(model, torch.from_numpy(PREPROCESS(photo())[0])[None]).raw for name, method in methods.items()
        }
        with opened(browser, html, tmp_path) as page:
            for layer in range(3):
                for head in range(3):
                    page.get_by_label(f"Layer {layer + 1}, head {head + 1}").click()
                    settle(page)
                    expected = is_stretched(weights[layer, head])
                    text = page.locator("#shows").text_content()
                    assert ("stretched" in text) == expected, (layer, head)
                    assert not expected or text.endswith(
                        f"(the whole scale is 0 to {page.locator('#high').text_content()})"
                    )
                    found.add(expected)
            page.locator("input[value=heatmaps]").check(force=True)
            for name in methods:
                page.locator("label", has_text=name).first.click()
                settle(page)
                expected = is_stretched(raw[name])
                assert ("stretched (the method's values are " in page.locator("#shows").text_content()) == expected
    assert found == {True, False}


def test_page_says_where_the_scale_of_a_gate_is_stretched(browser, tmp_path):
    torch.manual_seed(0)
    model = ConvNet(4, widths=(16, 32))
    insert(model, CBAM, preserve=False)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.reset_running_stats()
    model.eval()
    with torch.no_grad(), capture(model) as records:
        model(torch.from_numpy(PREPROCESS(photo())[0])[None])
    gates = [record.weights[0].numpy() for record in records.gates if record.kind == "spatial_gate"]
    html = explore(model, [photo()], preprocess=PREPROCESS, steps=0, methods={"gate": Gate()}).html
    with opened(browser, html, tmp_path) as page:
        page.locator("input[value=gates]").check(force=True)
        for number, gate in enumerate(gates):
            page.locator("label", has_text="over positions").nth(number).click()
            settle(page)
            text = page.locator("#shows").text_content()
            assert ("stretched (the whole scale is 0 to 1)" in text) == is_stretched(gate, 1)
    assert any(is_stretched(gate, 1) for gate in gates)
