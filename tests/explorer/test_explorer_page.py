"""The page in a browser: after clicks and keys, the page shows the values that the model computes."""

import re

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_images

from tests.explorer.clicked import values
from tests.explorer.explored import CLASSES, HOSTILE, PREPROCESS, needs_browser, opened, photo, settle, vit, weights_of
from visionattn.attention import CBAM, insert
from visionattn.capture import capture
from visionattn.data.placement import Preprocess
from visionattn.drawing.overlay import heat
from visionattn.explorer.explorer import explore
from visionattn.maps import Gate, RawAttention, Rollout
from visionattn.models import ConvNet

pytestmark = needs_browser


@pytest.fixture(scope="module")
def model():
    return vit()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Return two picture files, one of them in a folder whose name contains markup."""
    folder = tmp_path_factory.mktemp("pictures")
    hostile = folder / "<b onmouseover=alert(1)>'&quot;{{facts}}"
    hostile.mkdir()
    paths = [folder / "a.png", hostile / "b.png"]
    for seed, path in enumerate(paths):
        Image.fromarray(photo(seed=seed)).save(path)
    return paths


@pytest.fixture(scope="module")
def html(model, pictures):
    methods = {"raw": RawAttention(), "rollout": Rollout()}
    return explore(
        model, pictures, preprocess=PREPROCESS, methods=methods, class_names=CLASSES, model_name=HOSTILE, steps=3
    ).html


def click_patch(page, row, column):
    """Click the middle of a patch of the model's input, then move the pointer away from the picture."""
    placement = PREPROCESS(photo())[1]
    x, y = placement.to_source(np.array([[16 * (column + 0.5), 16 * (row + 0.5)]]))[0]
    box = page.locator("#picture").bounding_box()
    page.mouse.click(box["x"] + x / 100 * box["width"], box["y"] + y / 60 * box["height"])
    page.mouse.move(1, 1)
    settle(page)


def test_a_click_shows_the_attention_of_the_patch(browser, html, model, tmp_path):
    weights = weights_of(model, photo())
    with opened(browser, html, tmp_path) as page:
        np.testing.assert_allclose(values(page), weights[2, :, 0, 1:].mean(0), atol=0.003 * weights[2, :, 0].max())
        click_patch(page, 1, 2)
        query = 1 + 1 * 4 + 2  # the class token comes first, then four patches per row
        np.testing.assert_allclose(values(page), weights[2, :, query, 1:].mean(0), atol=0.003)
        page.get_by_label("Layer 2, head 3").click()
        np.testing.assert_allclose(values(page), weights[1, 2, query, 1:], atol=0.003)
        settle(page)
        row, column = divmod(int(weights[1, 2, query, 1:].argmax()), 4)
        readout = page.locator("#readout").text_content()
        assert f"Patch row 2, column 3, layer 2, head 3: most on row {row + 1}, column {column + 1}" in readout
        shown = float(readout.split(", ")[-1].split(" %")[0])
        assert shown == pytest.approx(100 * weights[1, 2, query, 1:].max(), abs=0.2)
        page.get_by_label("Heads", exact=True).select_option("max")
        np.testing.assert_allclose(values(page), weights[1, :, query, 1:].max(0), atol=0.003)
        page.get_by_role("button", name="Class token").click()
        np.testing.assert_allclose(values(page), weights[1, :, 0, 1:].max(0), atol=0.003)


def test_colours_of_the_picture_match_the_heat_of_each_patch(browser, html, model, tmp_path):
    weights = weights_of(model, photo())
    placement = PREPROCESS(photo())[1]
    ramp = heat(np.arange(256, dtype=np.float32)[None] / 255)[0].astype(float)
    with opened(browser, html, tmp_path) as page:
        page.get_by_label("Smooth").uncheck()
        page.get_by_label("Opacity").fill("80")
        click_patch(page, 0, 1)
        row = weights[2, :, 2, 1:].mean(0)
        stretched = (row - row.min()) / (row.max() - row.min())
        for cell in range(12):
            place = [[16 * (cell % 4 + 0.5), 16 * (cell // 4 + 0.5)]]
            x, y = (int(v) for v in placement.to_source(np.array(place))[0])
            at = 4 * (y * 100 + x)  # first of four bytes of the pixel
            base, drawn = (
                np.array(page.evaluate(f"Array.from({pixels}.slice({at}, {at + 3}))"), float)
                for pixels in ("base.data", "pen(canvas).getImageData(0, 0, 100, 60).data")
            )
            opacity = 0.8 * stretched[cell] ** 0.5
            muted = 0.45 * base + 0.55 * (base @ [0.299, 0.587, 0.114])
            expected = (1 - opacity) * muted + opacity * ramp[round(255 * stretched[cell])]
            np.testing.assert_allclose(drawn, expected, atol=5)
            grey = np.array([0.299, 0.587, 0.114])  # compare the brightness only: WEBP compression changes colours
            assert abs((base - photo()[y, x]) @ grey) < 16


def test_hovering_shows_a_patch_and_leaving_restores_the_choice(browser, html, tmp_path):
    with opened(browser, html, tmp_path) as page:
        click_patch(page, 1, 1)
        chosen = values(page)
        box = page.locator("#picture").bounding_box()
        page.mouse.move(box["x"] + 0.62 * box["width"], box["y"] + 0.4 * box["height"])
        settle(page)
        assert np.abs(values(page) - chosen).max() > 0.01
        page.mouse.move(1, 1)
        settle(page)
        np.testing.assert_array_equal(values(page), chosen)
        click_patch(page, 1, 1)  # a second click returns to the whole image
        assert "Class token" in page.locator("#readout").text_content()


def test_rollout_on_the_page_equals_the_method(browser, html, model, tmp_path):
    expected = Rollout()(model, torch.from_numpy(PREPROCESS(photo())[0])[None]).raw[0].flatten().numpy()
    weights = weights_of(model, photo()).mean(1)
    with opened(browser, html, tmp_path) as page:
        page.get_by_label("Layer 3, rollout from layer 1").click()
        np.testing.assert_allclose(values(page), expected, atol=0.002)
        click_patch(page, 2, 3)
        row = np.eye(13)[12]
        for layer in (2, 1, 0):
            row = row @ (weights[layer] + np.eye(13)) / 2
        np.testing.assert_allclose(values(page)[:11], row[1:12], atol=0.002)
        page.get_by_label("Layer 1, rollout from layer 1").click()
        np.testing.assert_allclose(values(page)[:11], (weights[0][12] / 2)[1:12], atol=0.002)


def test_every_control_can_be_reached_by_keyboard(browser, html, model, tmp_path):
    weights = weights_of(model, photo(seed=1))
    with opened(browser, html, tmp_path) as page:
        stops = []
        for _ in range(40):
            page.keyboard.press("Tab")
            stop = page.evaluate(
                "(({ id, ariaLabel, name, title, textContent }) => id || ariaLabel || name || title || textContent)"
                "(document.activeElement)"
            )
            if stops and stop == stops[0]:
                break
            stops.append(stop)
        assert stops[:5] == ["marks", "opacity", "colours", "smooth", "a.png"]
        assert {"view", "Layer", "Heads", "Class token", "Layer 3, mean of its heads"} <= set(stops)
        page.focus("#film button")
        page.keyboard.press("ArrowRight")
        page.wait_for_selector("body[data-ready='1']")
        page.focus("#marks")
        page.keyboard.press("ArrowLeft")  # the first arrow key chooses the middle patch: row 2, column 3
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("ArrowUp")
        settle(page)
        np.testing.assert_allclose(values(page), weights[2, :, 1 + 1, 1:].mean(0), atol=0.003)
        page.focus("#heads button[aria-pressed=true]")
        page.keyboard.press("ArrowUp")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        settle(page)
        np.testing.assert_allclose(values(page), weights[1, 0, 2, 1:], atol=0.003)
        page.focus("#marks")
        page.keyboard.press("Escape")
        settle(page)
        assert page.locator("#readout").text_content().startswith("Class token, layer 2, head 1")
        page.focus("input[name=view]")
        page.keyboard.press("ArrowRight")
        settle(page)
        assert page.locator("#readout").text_content().startswith("raw: attention of blocks.2.attn")
        page.focus("input[name=heatmap]")
        page.keyboard.press("ArrowDown")
        settle(page)
        assert page.locator("#readout").text_content().startswith("rollout")


def test_markup_in_names_is_shown_as_text(browser, html, tmp_path):
    with opened(browser, html, tmp_path) as page:
        assert page.locator("#model").text_content() == HOSTILE
        assert HOSTILE in page.locator("#answer").text_content()
        assert page.locator("#film img").count() == 2
        page.locator("#film button").nth(1).click()
        page.wait_for_selector("body[data-ready='1']")
        assert page.locator("#name").text_content().startswith("<b onmouseover=alert(1)>'&quot;{{facts}}/b.png")
        assert page.locator("[onmouseover], [onerror]").count() == 0
        assert page.evaluate("document.images.length") == 2


def test_a_notebook_frame_works_sandboxed(browser, model):
    shown = explore(model, torch.zeros(1, 3, 48, 64), steps=0, methods={"raw": RawAttention()})._repr_html_()
    page = browser.new_page()
    page.set_content(shown)
    page.frame_locator("iframe").locator("body[data-ready]").wait_for()
    page.close()


def test_the_content_policy_blocks_other_scripts_and_requests(browser, html, tmp_path):
    page = browser.new_page()
    page.set_content(html)
    page.wait_for_selector("body[data-ready]")
    ran = page.evaluate(
        """async () => {
          const script = document.createElement("script");
          script.textContent = "window.ran = true";
          document.body.append(script);
          const request = await fetch("https://example.invalid/").then(() => "loaded", () => "refused");
          return [window.ran ?? false, request];
        }"""
    )
    page.close()
    assert ran == [False, "refused"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("size", [(390, 844), (1280, 860)])
def test_the_page_fits_phone_and_desktop_with_enough_contrast(browser, html, tmp_path, scheme, size):
    context = {"viewport": {"width": size[0], "height": size[1]}, "color_scheme": scheme}
    with opened(browser, html, tmp_path, **context) as page:
        height = "document.documentElement.scrollHeight"
        before = page.locator("#panel").bounding_box(), page.evaluate(height)
        assert page.evaluate("document.documentElement.scrollWidth") <= size[0]
        click_patch(page, 1, 1)
        assert (page.locator("#panel").bounding_box(), page.evaluate(height)) == before  # the layout does not shift
        for selector in ("#readout", "#name", "#keys", "#answer .number", "#legend span"):
            assert contrast(page, selector) >= 4.5


def contrast(page, selector):
    """Return WCAG's contrast of an element's text."""

    def luminance(colour):
        parts = np.array([float(part) for part in colour.strip("rgba()").split(",")[:3]]) / 255
        linear = np.where(parts <= 0.04045, parts / 12.92, ((parts + 0.055) / 1.055) ** 2.4)
        return linear @ [0.2126, 0.7152, 0.0722]

    ink = page.locator(selector).first.evaluate("(element) => getComputedStyle(element).color")
    paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
    light, dark = sorted(map(luminance, (ink, paper)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.fixture(scope="module")
def page_without_model():
    """Return a page of given glimpses and boxes, and these glimpses and boxes. The picture fills the input."""
    random = np.random.default_rng(0)
    locations = np.array([[20.0, 30], [70, 15], [50, 50]])
    glimpses = {
        "locations": locations,
        "boxes": np.stack([np.concatenate([locations - side, locations + side], 1) for side in (5, 12)], 1),
        "patches": random.integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8),
        "probabilities": [[0.4, 0.3, 0.2, 0.1], [0.1, 0.6, 0.2, 0.1], [0.05, 0.05, 0.9, 0]],
    }
    boxes = {
        "boxes": [[10, 10, 40, 50], [55, 5, 95, 35]],
        "labels": [1, "cup"],
        "scores": [0.9, 0.4],
        "maps": random.random((2, 3, 4)),
    }
    options = {"glimpses": [glimpses], "detections": [boxes], "class_names": CLASSES}
    stretched = Preprocess((48, 64), fit="stretch")
    return explore(None, [photo()], preprocess=stretched, **options).html, glimpses, boxes


def test_buttons_slider_and_keys_move_along_the_path_of_glimpses(browser, page_without_model, tmp_path):
    html, glimpses, _ = page_without_model
    with opened(browser, html, tmp_path) as page:

        def check(step):
            settle(page)
            points = page.locator("#marks polyline.mark").get_attribute("points").split()
            np.testing.assert_allclose([list(map(float, point.split(","))) for point in points],
                                       glimpses["locations"][: step + 1])  # fmt: skip
            boxes = page.locator("#marks rect.mark").evaluate_all(
                "(all) => all.map((box) => ['x', 'y', 'width', 'height'].map((name) => Number(box.getAttribute(name))))"
            )
            left, top, right, bottom = np.moveaxis(glimpses["boxes"][step], -1, 0)
            np.testing.assert_allclose(boxes, np.stack([left, top, right - left, bottom - top], 1))
            patches = page.locator(".patches img").evaluate_all(
                """async (all) => { await Promise.all(all.map((patch) => patch.decode()));
                   return all.map((patch) => { const sheet = new OffscreenCanvas(8, 8).getContext("2d");
                   sheet.drawImage(patch, 0, 0); return [...sheet.getImageData(0, 0, 8, 8).data]; }); }"""
            )
            np.testing.assert_array_equal(
                np.array(patches).reshape(2, 8, 8, 4)[..., :3], glimpses["patches"][step].reshape(2, 8, 8, 3)
            )
            percents = page.locator("#panel .bars .number").all_text_contents()
            names = page.locator("#panel .bars .name").all_text_contents()
            shown = dict(zip(names, (float(percent.removesuffix(" %")) / 100 for percent in percents), strict=True))
            np.testing.assert_allclose([shown[name] for name in CLASSES], glimpses["probabilities"][step], atol=1e-4)

        check(0)
        page.get_by_role("button", name="Next glimpse").click()
        check(1)
        page.get_by_label("Glimpse", exact=True).fill("3")
        check(2)
        page.focus("#marks")
        page.keyboard.press("ArrowLeft")
        check(1)
        page.get_by_role("button", name="Play").click()
        page.wait_for_function("state.step === 2")
        check(2)
        page.get_by_role("button", name="Play").wait_for()  # the last glimpse stops the playback


def test_a_click_on_a_box_shows_the_map_of_the_box(browser, page_without_model, tmp_path):
    html, _, boxes = page_without_model
    with opened(browser, html, tmp_path) as page:
        page.locator("input[value=detections]").check(force=True)
        for box in (1, 0):
            page.locator("#marks .box").nth(box).click()
            settle(page)
            np.testing.assert_allclose(values(page), boxes["maps"][box].ravel(), atol=0.003)
        assert page.locator("#readout").text_content() == f"Box 1 of 2: {HOSTILE} 90.0 %"
        page.locator("#marks .box").nth(1).focus()
        page.keyboard.press("Enter")
        settle(page)
        np.testing.assert_allclose(values(page), boxes["maps"][1].ravel(), atol=0.003)
        assert page.locator("#marks .box").nth(1).get_attribute("aria-pressed") == "true"


def test_the_page_shows_gates_by_layer_and_by_channel(browser, tmp_path):
    torch.manual_seed(0)
    model = ConvNet(4, widths=(16, 32))
    insert(model, CBAM, preserve=False)
    model.eval()
    picture = torch.from_numpy(PREPROCESS(photo())[0])[None]
    with torch.no_grad(), capture(model) as records:
        model(picture)
    gates = {"channel": [], "spatial": []}
    for record in records.gates:
        gates[record.kind.removesuffix("_gate")].append(record.weights[0].numpy())
    html = explore(model, [photo()], preprocess=PREPROCESS, steps=0, methods={"gate": Gate()}).html
    with opened(browser, html, tmp_path) as page:
        page.locator("input[value=gates]").check(force=True)
        page.locator("input[name=gate]").nth(3).check()
        settle(page)
        np.testing.assert_allclose(values(page), gates["spatial"][1].ravel(), atol=0.003)
        page.locator("input[name=gate]").nth(2).check()
        order = np.argsort(-gates["channel"][1].ravel(), kind="stable")
        names = page.locator("input[name=channel] + .name").all_text_contents()
        assert names == [f"channel {channel}" for channel in order[:8]]
        weights = page.locator("#panel .number").all_text_contents()
        np.testing.assert_allclose(list(map(float, weights)), gates["channel"][1].ravel()[order[:8]], atol=6e-4)
        page.locator("input[name=channel]").nth(1).check()
        settle(page)
        assert f"Channel {order[1]} of blocks.1.attention.channel" in page.locator("#readout").text_content()


def test_the_page_compares_a_map_with_the_controls_and_gives_no_verdict(browser, html, tmp_path):
    with opened(browser, html, tmp_path) as page:
        page.locator("input[value=heatmaps]").check(force=True)
        settle(page)
        lost = page.evaluate("Object.values(chosenHeatmap().compared).some((found) => found.worse.length)")
        assert page.locator(".verdict .warning").count() == int(lost)
        assert page.locator(".verdict .fine").count() == int(not lost)
        for name, is_method in (("raw", True), ("centre", False)):
            page.locator("label", has_text=name).first.click()
            settle(page)
            for metric in ("deletion", "insertion"):
                area = page.evaluate(f"chosenHeatmap().curves.{metric}.area.toPrecision(2)")
                assert f"{metric} {area}" in page.locator(".verdict").text_content()
            text = page.locator(".verdict").text_content()
            assert ("One image cannot show" in text) == is_method
            assert not re.search("[✓✗]", page.locator("#panel").text_content())
            if is_method:
                names = page.evaluate(
                    "Object.values(chosenHeatmap().compared).flatMap((found) => Object.values(found).flat())"
                )
                assert all(control in text for control in names)
                assert len(names) == 2 * 3  # deletion and insertion, three controls


@pytest.mark.slow
def test_a_page_of_twenty_photographs_has_15_mb_and_opens_and_turns_within_two_seconds(browser, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model("vit_small_patch16_224").eval()
    photographs, random = load_sample_images().images, np.random.default_rng(0)
    pictures = []
    for number in range(20):  # random crops of two photographs
        side, whole = int(random.integers(224, 400)), photographs[number % 2]
        y, x = (int(random.integers(0, length - side)) for length in whole.shape[:2])
        pictures.append(np.ascontiguousarray(whole[y : y + side, x : x + side]))
    page = explore(model, pictures, steps=0, methods={"raw": RawAttention()})
    assert len(page.html.encode()) <= 15_000_000
    assert page.levels >= 4
    with opened(browser, page.html, tmp_path) as tab:
        assert tab.evaluate("performance.now()") < 2_000
        milliseconds = tab.evaluate(
            """async () => {
              const before = performance.now();
              await turnTo(19);
              await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
              return performance.now() - before;
            }"""
        )
        assert milliseconds < 2_000
