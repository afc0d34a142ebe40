"""Exports and explorer pages show the heatmaps that the method computes for detected boxes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import visionattn
from tests.explorer.clicked import values
from tests.explorer.explored import needs_browser, opened, photo, settle
from tests.models.detectors.small import dense, query
from visionattn.data import Preprocess
from visionattn.drawing import Style, render
from visionattn.errors import UsageError
from visionattn.explorer.explorer import explore
from visionattn.maps import ODAM, SURE, EigenCAM, MaxOverBoxes, default_box_method
from visionattn.overlays.explainer import Explainer
from visionattn.overlays.folder.export import export
from visionattn.overlays.per_box import page_detections

NAMES = ("disc", "square", "triangle", "cross")
PREPROCESS = Preprocess(64, fit="letterbox")

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


def confident(detector):
    """Give an untrained detector weights with which some scores are high enough for its boxes to be shown."""
    torch.manual_seed(0)
    for name, module in detector.named_modules():
        if name.rpartition(".")[0].endswith("classify") or name.endswith("head.classify"):
            nn.init.normal_(module.weight, std=0.5)
            nn.init.constant_(module.bias, -0.5)
    return detector.eval()


@pytest.fixture(scope="module", params=[dense, query])
def detector(request):
    return confident(request.param())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for seed in range(2):
        Image.fromarray(photo(seed=seed)).save(folder / f"{seed}.png")
    return folder


def explained(detector, seed, **options):
    image, placement = PREPROCESS(photo(seed=seed))
    (maps,) = default_box_method(detector)(detector, torch.from_numpy(image)[None], **options)
    return maps, placement


def test_exported_boxes_have_their_own_heatmaps(detector, files, tmp_path):
    explainer = Explainer(detector, PREPROCESS, class_names=NAMES)
    assert export([files], tmp_path, explainer, save=["overlay", "boxes", "array"]).exit_code == 0
    entries = [json.loads(line) for line in (tmp_path / "manifest.jsonl").read_text().splitlines()]
    entries = {entry["source"][-5]: entry for entry in entries if "source" in entry}
    for seed in range(2):
        maps, placement = explained(detector, seed, max_boxes=20)
        assert len(maps.boxes) > 1
        expected = placement.boxes_to_source(maps.boxes.numpy())
        entry = entries[str(seed)]
        np.testing.assert_allclose([found[:4] for found in entry["found"]], expected, atol=0.06)
        labels = [f"{NAMES[label]} {score:.2f}" for label, score in zip(maps.labels, maps.scores, strict=True)]
        assert [found[4] for found in entry["found"]] == labels
        assert entry["method"] == maps.method
        with np.load(tmp_path / f"{seed}.png.array.npz") as arrays:
            np.testing.assert_allclose(arrays["boxes"], expected, atol=0.06)
            np.testing.assert_allclose(arrays["maps"], maps.heatmaps.numpy(), atol=1e-5)
            np.testing.assert_allclose(arrays["heatmap"], maps.heatmaps.numpy().max(0), atol=1e-5)
        with Image.open(tmp_path / f"{seed}.png.boxes.jpg") as sheet:
            rows = -(-(1 + len(maps.boxes)) // 4)
            assert sheet.height > rows * 100  # a row of tiles has about 100 pixels


def test_with_a_target_class_only_boxes_of_this_class_are_explained(detector):
    images = torch.from_numpy(np.stack([PREPROCESS(photo(seed=seed))[0] for seed in range(2)]))
    method = default_box_method(detector)
    all_classes = MaxOverBoxes(method)(detector, images)
    wanted = all_classes.output[0]["labels"][0]
    one_class = MaxOverBoxes(method)(detector, images, target=torch.stack([wanted, torch.tensor(99)]))
    kept = all_classes.output[0]["labels"] == wanted
    torch.testing.assert_close(one_class.output[0]["boxes"], all_classes.output[0]["boxes"][kept])
    torch.testing.assert_close(one_class.heatmaps[0], all_classes.output[0]["maps"][kept].amax(0))
    assert not one_class.heatmaps[1].any()
    assert len(one_class.output[1]["boxes"]) == 0
    assert all_classes.output[0]["scores"].min() >= SURE


def test_heatmap_and_overlay_show_the_boxes(detector):
    maps, placement = explained(detector, 0, max_boxes=20)
    found = visionattn.heatmap(detector, photo(), preprocess=PREPROCESS, class_names=NAMES)
    np.testing.assert_allclose(found.explained.heatmap_hw, maps.heatmaps.numpy().max(0), atol=1e-5)
    np.testing.assert_allclose(found.explained.boxes, placement.boxes_to_source(maps.boxes.numpy()), atol=0.06)
    drawn = np.asarray(visionattn.overlay(detector, photo(), preprocess=PREPROCESS, class_names=NAMES))
    without_boxes = render(photo(), found.explained.heatmap_hw, placement, Style())
    x1, y1, _, y2 = (round(edge) for edge in found.explained.boxes[-1])
    assert (drawn != without_boxes)[y1:y2, x1].any(1).all()


class ThreeBoxes(nn.Module):
    """Returns three boxes for a wide picture with padding above and below: the first lies in the padding above."""

    def __init__(self):
        super().__init__()
        self.features = nn.Conv2d(3, 1, 1)

    def forward(self, images):
        zeros = self.features(images).mean((1, 2, 3)).sigmoid() * 0  # so that the scores have gradients
        boxes = torch.tensor([[2.0, 2, 30, 14], [8, 20, 40, 44], [30, 22, 62, 40]])
        scores = torch.tensor([0.9, 0.8, 0.1])
        return [{"boxes": boxes, "scores": scores + zero, "labels": torch.tensor([0, 1, 2])} for zero in zeros]


def test_boxes_that_lie_entirely_in_the_padding_are_not_shown(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.fromarray(photo()[:32, :64]).save(folder / "wide.png")
    method = MaxOverBoxes(ODAM("features"), min_score=0.05)  # includes the box of score 0.1
    explainer = Explainer(ThreeBoxes(), PREPROCESS, method, class_names=NAMES)
    assert export([folder], tmp_path / "out", explainer, save=["boxes", "array"]).exit_code == 0
    entries = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    (entry,) = [entry for entry in entries if "source" in entry]
    assert entry["found"] == [[8, 4, 40, 28, "square 0.80"], [30, 6, 62, 24, "triangle 0.10"]]
    with np.load(tmp_path / "out" / "wide.png.array.npz") as arrays:
        assert len(arrays["maps"]) == len(arrays["boxes"]) == 2
    found = page_detections(
        ODAM("features")(ThreeBoxes(), torch.zeros(1, 3, 64, 64))[0], PREPROCESS(photo()[:32, :64])[1]
    )
    assert {name: len(found[name]) for name in ("boxes", "labels", "scores", "maps")} == dict.fromkeys(
        ("boxes", "labels", "scores", "maps"), 1
    )


def test_box_outputs_and_box_methods_need_a_detector(files, tmp_path):
    classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(
        UsageError, match="the kind of output 'boxes' needs boxes, and eigencam on this Sequential gives none"
    ):
        export([files], tmp_path, Explainer(classifier, PREPROCESS, EigenCAM()), save=["boxes"])
    with pytest.raises(UsageError, match="boxes of a detector, but this model is not a detector"):
        explore(classifier, [photo()], preprocess=PREPROCESS, methods={"odam": ODAM()})


@needs_browser
def test_a_click_on_a_box_shows_its_heatmap(detector, browser, tmp_path):
    maps, placement = explained(detector, 0, max_boxes=30)
    page_of = explore(detector, [photo()], preprocess=PREPROCESS, class_names=NAMES, steps=0)
    assert page_of.left_out == {}
    with opened(browser, page_of.html, tmp_path) as page:
        assert page.locator("#marks .box").count() == len(maps.boxes) > 1  # shown when the page opens
        sides = page.locator("#marks .box").evaluate_all(
            "(all) => all.map((box) => ['x', 'y', 'width', 'height'].map((name) => Number(box.getAttribute(name))))"
        )
        corners = placement.boxes_to_source(maps.boxes.numpy())
        corners[:, 2:] -= corners[:, :2]
        np.testing.assert_allclose(sides, corners, atol=0.02)
        for number in (len(sides) - 1, 0):
            page.locator("#marks .box").nth(number).dispatch_event("click")
            settle(page)
            np.testing.assert_allclose(values(page), maps.heatmaps[number].numpy().ravel(), atol=0.003)
            readout = page.locator("#readout").text_content()
            assert readout.startswith(f"Box {number + 1} of {len(sides)}: {NAMES[maps.labels[number]]}")
            assert readout.endswith(f"; {maps.source}")
