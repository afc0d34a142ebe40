"""Targets by name are the targets that their forms describe, in Python and in exports."""

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

import visionattn as va
from tests.capture import models
from tests.maps.test_targets import Segmenter
from tests.refusals import refuses
from visionattn.cli import main
from visionattn.data import Preprocess, read_image
from visionattn.errors import DataError, UsageError
from visionattn.maps import Against, GradCAM, Margin, Region, Similarity
from visionattn.overlays import TARGETS, Explainer, export
from visionattn.overlays.targets import named_target, targets_by_name

NAMES = ("cat", "dog", "not:cat", "3", "e", "f", "g")


@pytest.fixture(scope="module")
def explainer():
    return Explainer(models.resnet(), Preprocess(64), GradCAM(), NAMES)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("dog", 1),
        ("5", 5),
        ("not:cat", 2),  # the name of a class comes first
        ("not:dog", Against(1)),
        ("margin:cat:dog", Margin(0, 1)),
        ("margin:4:e", Margin(4, 4)),
    ],
)
def test_a_text_names_a_target(text, expected, explainer):
    assert named_target(explainer, text) == expected


def test_a_text_names_a_region(explainer):
    target = named_target(explainer, "region:dog")
    assert isinstance(target, Region)
    assert (target.index, target.mask) == (1, None)


@pytest.fixture
def pictures(tmp_path):
    random = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(random.integers(0, 256, (60, 80, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_a_file_names_the_similarity_to_its_image(explainer, pictures):
    file, other = (str(pictures / name) for name in ("a.png", "b.png"))
    found = va.heatmap(explainer.model, file, method="gradcam", target=f"like:{other}", preprocess=explainer.preprocess)
    image, reference = (torch.from_numpy(explainer.preprocess(read_image(path))[0])[None] for path in (file, other))
    with torch.no_grad():
        target = Similarity(explainer.model(reference))
    expected = GradCAM()(explainer.model, image, target=target)
    np.testing.assert_allclose(found.explained.raw_hw, expected.raw[0].numpy(), atol=1e-7, rtol=1e-3)


@pytest.mark.parametrize(
    ("error", "message", "text"),
    [
        (DataError, "there is no class 'bird'", "margin:cat:bird"),
        (UsageError, "the target 'margin:cat' is incomplete; write CLASS, not:CLASS, margin:CLASS:CLASS", "margin:cat"),
        (UsageError, "the target 'like:' is incomplete", "like:"),
        (DataError, "nowhere.png", "like:nowhere.png"),
        (DataError, "there is no class 'nut:cat'", "nut:cat"),
    ],
)
def test_a_text_that_names_no_target_is_an_error(error, message, text, explainer):
    refuses(error, re.escape(message), named_target, explainer, text)


def test_an_export_takes_targets_by_name_and_makes_all_again_for_another(pictures, explainer, tmp_path):
    quiet = {"save": ["array"], "console": Console(quiet=True)}
    inputs, out = [pictures / "a.png", pictures / "b.png"], tmp_path / "out"
    assert export(inputs, out, explainer, target="margin:cat:dog", **quiet).written == 2
    first = {path.name: np.load(path)["heatmap"] for path in out.rglob("*.npz")}
    assert export(inputs, out, explainer, target="margin:cat:dog", **quiet).skipped == 2
    assert export(inputs, out, explainer, target="margin:dog:cat", **quiet).written == 2
    second = {path.name: np.load(path)["heatmap"] for path in out.rglob("*.npz")}
    assert all(not np.allclose(first[name], second[name]) for name in first)
    seen = va.heatmap(
        explainer.model, str(inputs[0]), method="gradcam", target=Margin(1, 0), preprocess=explainer.preprocess
    )
    (name,) = [name for name in second if name.startswith("a.png")]
    np.testing.assert_allclose(second[name], seen.explained.heatmap_hw, atol=1e-4)


def test_an_export_is_made_again_if_the_reference_image_changes(pictures, explainer, tmp_path):
    options = {"target": f"like:{pictures / 'b.png'}", "console": Console(quiet=True)}
    assert export([pictures / "a.png"], tmp_path / "out", explainer, **options).written == 1
    assert export([pictures / "a.png"], tmp_path / "out", explainer, **options).skipped == 1
    Image.new("RGB", (60, 60), (200, 20, 20)).save(pictures / "b.png")
    assert export([pictures / "a.png"], tmp_path / "out", explainer, **options).written == 1


def test_an_image_without_the_region_fails_and_the_others_are_written(pictures, tmp_path):
    model = models.randomised(Segmenter())
    with torch.no_grad():
        model.conv.weight.zero_()
        model.conv.weight[0] = 0.1
        model.head.weight.zero_()
        model.head.weight[1, 0] = 1
        model.head.bias.copy_(torch.tensor([0.3, 0, -9, -9]))
    Image.new("RGB", (60, 60), (20, 20, 20)).save(pictures / "dark.png")
    Image.new("RGB", (60, 60), (250, 250, 250)).save(pictures / "light.png")
    explainer = Explainer(model, Preprocess(32), GradCAM("conv"))
    inputs = [pictures / "light.png", pictures / "dark.png"]
    summary = export(inputs, tmp_path / "out", explainer, target="region:1", console=Console(quiet=True))
    assert (summary.written, summary.failed) == (1, 1)
    assert "no pixel has class 1 in image 0 of the batch, so the region is empty" in summary.failures[0][1]


def test_the_help_of_overlay_lists_the_forms(capsys):
    with pytest.raises(SystemExit):
        main(["overlay", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    for form, meaning in TARGETS.items():
        assert f"{form} {meaning}" in printed


def test_a_number_that_means_two_classes_is_an_error_in_every_form(explainer):
    other = replace(explainer, class_names=(*NAMES[:5], "g", "f"))
    for text in ("not:5", "region:5", "margin:0:5"):
        refuses(DataError, "in one model and .* in another", targets_by_name, [explainer, other], text)
    assert len(targets_by_name([explainer, other], "margin:0:1")) == 2
