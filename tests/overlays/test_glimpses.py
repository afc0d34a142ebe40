"""A trace of glimpses equals the network's rollout; exported files and explorer pages contain the trace."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.explorer.pages import facts
from visionattn.attention import Gaussian, Retina
from visionattn.data import Preprocess, read_image, write_image
from visionattn.drawing import Style, animate_glimpses, draw_scanpath
from visionattn.drawing.scanpath import centres
from visionattn.errors import UsageError
from visionattn.explorer.explorer import explore
from visionattn.models import ConvNet, GlimpseNetwork, MLPEncoder
from visionattn.overlays import Explainer, trace_glimpses
from visionattn.overlays.folder.export import export


def network(preprocess, patch_size=4, scales=2, glimpses=5):
    torch.manual_seed(0)
    retina = Retina(patch_size, scales=scales)
    options = {"policy": Gaussian, "encoder": MLPEncoder, "hidden_size": 16, "in_chans": preprocess.channels}
    model = GlimpseNetwork(7, retina=retina, num_glimpses=glimpses, **options)
    with torch.no_grad():
        model.policy.layers[-1].weight.mul_(300)
    return model.eval()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_trace_matches_the_rollout_and_the_pixels_of_the_picture(channels):
    preprocess = Preprocess(24, fit="stretch", mean=(0.2,) * channels, std=(0.5,) * channels)
    pictures = np.random.default_rng(1).integers(0, 256, (2, 24, 24, 3)).astype(np.uint8)
    pictures = pictures[..., :1].repeat(3, -1) if channels == 1 else pictures
    values, placements = zip(*map(preprocess, pictures), strict=True)
    images, model = torch.from_numpy(np.stack(values)), network(preprocess)
    traces = trace_glimpses(model, images, placements, preprocess)
    with torch.no_grad():
        rollout = model.rollout(images, locations="mean")
    for index, trace in enumerate(traces):
        assert trace["patches"].shape == (5, 2, 4, 4, 3)
        np.testing.assert_allclose(trace["probabilities"], rollout.logits[index, 0].softmax(-1).numpy(), rtol=1e-5)
        np.testing.assert_allclose(trace["boxes"], model.retina.boxes(rollout.location[index, 0], (24, 24)).numpy())
        np.testing.assert_allclose(trace["locations"], centres(trace["boxes"]))
        for box, patch in zip(trace["boxes"][:, 0].astype(int), trace["patches"][:, 0], strict=True):
            left, top = np.maximum(box[:2], 0)
            expected = pictures[index][top : box[3], left : box[2]]
            inside = patch[top - box[1] :, left - box[0] :][: len(expected), : expected.shape[1]]  # not the padding
            assert expected.size
            np.testing.assert_allclose(inside.astype(int), expected, atol=1)


def test_an_export_draws_the_scanpath_and_writes_the_glimpses(tmp_path):
    (tmp_path / "in").mkdir()
    source = np.random.default_rng(3).integers(0, 256, (36, 48, 3)).astype(np.uint8)
    write_image(tmp_path / "in" / "a.png", source)
    preprocess = Preprocess(24, fit="letterbox", mean=(0.2,) * 3, std=(0.5,) * 3)
    model = network(preprocess)
    quiet = {"console": Console(quiet=True), "style": Style(suffix=".png")}
    summary = export([tmp_path / "in"], tmp_path / "out", Explainer(model, preprocess), save=["gaze", "array"], **quiet)
    assert summary.exit_code == 0
    values, placement = preprocess(source)
    (trace,) = trace_glimpses(model, torch.from_numpy(values)[None], [placement], preprocess)
    drawn = read_image(tmp_path / "out" / "a.png.gaze.png")
    np.testing.assert_array_equal(drawn, draw_scanpath(source, trace["boxes"]))
    assert drawn.shape == (36 * 9, 48 * 9, 3)
    with np.load(tmp_path / "out" / "a.png.array.npz") as arrays:
        np.testing.assert_allclose(arrays["glimpses"], trace["boxes"])
    (entry,) = map(json.loads, (tmp_path / "out" / "manifest.jsonl").read_text().splitlines())
    np.testing.assert_allclose(entry["fixations"], trace["locations"], atol=0.051)
    assert entry["layer"] == "glimpses of retina"
    with pytest.raises(UsageError, match="'gaze' needs glimpses, and gradcam on this ConvNet gives none; save "):
        export([tmp_path / "in"], tmp_path / "no", Explainer(ConvNet(3), preprocess), save=["gaze"], **quiet)


def test_an_export_writes_the_animation_of_the_glimpses(tmp_path):
    source = np.random.default_rng(3).integers(0, 256, (36, 48, 3)).astype(np.uint8)
    write_image(tmp_path / "a.png", source)
    preprocess, names = Preprocess(24, mean=(0.2,) * 3, std=(0.5,) * 3), tuple("abcdefg")
    model, quiet = network(preprocess), {"console": Console(quiet=True), "save": ["animation"]}
    summary = export([tmp_path / "a.png"], tmp_path / "out", Explainer(model, preprocess, class_names=names), **quiet)
    assert summary.exit_code == 0
    values, placement = preprocess(source)
    (trace,) = trace_glimpses(model, torch.from_numpy(values)[None], [placement], preprocess)
    expected = animate_glimpses(
        source, trace["boxes"], trace["patches"], probabilities_TK=trace["probabilities"], class_names=names
    )
    with Image.open(tmp_path / "out" / "a.png.animation.webp") as film:
        assert film.n_frames == 5
        for number, frame in enumerate(expected):
            film.seek(number)
            np.testing.assert_array_equal(np.array(film.convert("RGB")), frame)
    with pytest.raises(UsageError, match="'animation' needs a GlimpseNetwork, and gradcam on this ConvNet gives none"):
        export([tmp_path / "a.png"], tmp_path / "no", Explainer(ConvNet(3), preprocess), **quiet)


def test_the_explorer_page_has_the_glimpses():
    preprocess = Preprocess(24, fit="stretch", mean=(0.2,), std=(0.5,))
    model, source = network(preprocess), np.random.default_rng(4).integers(0, 256, (36, 48, 3)).astype(np.uint8)
    page = facts(explore(model, [source], preprocess=preprocess, steps=0))["pictures"][0]
    values, placement = preprocess(source)
    (trace,) = trace_glimpses(model, torch.from_numpy(values)[None], [placement], preprocess)
    np.testing.assert_allclose(page["glimpses"]["locations"], trace["locations"], atol=0.006)
    np.testing.assert_allclose(page["glimpses"]["boxes"], trace["boxes"], atol=0.006)
    assert [heatmap["name"] for heatmap in page["heatmaps"]] == ["gaze"]
