"""Scores of methods and controls on a model with a known heatmap."""

import json
import pickle
import re

import numpy as np
import pytest
import timm
import torch

from tests.capture import models
from tests.capture.models import assert_same_state, state_of
from tests.evaluation.scored import Fixed, Patch, TrueMap, bright_pictures, region
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.evaluation import (
    DEFAULT_METRICS,
    CentreGaussian,
    Edges,
    RandomMap,
    deletion,
    insertion,
    road,
    saco,
    score,
)
from visionattn.evaluation.controls import METRICS
from visionattn.evaluation.localisation import energy, hit_share, inside, overlap
from visionattn.maps import METHODS, Method, methods_that_fit
from visionattn.maps.method import Explanation

BOX = (2, 3, 8, 9)
PLACE = region(box=BOX)


def batches(count=24, size=5, known=("box", "mask", "label")):
    """Return batches of images that `Patch` assigns to class 1, with the keys `known`."""
    images = bright_pictures(PLACE, count)
    whole = {
        "image": images,
        "box": torch.tensor(BOX).float().expand(count, -1),
        "mask": PLACE.expand(count, -1, -1),
        "label": torch.arange(count).clamp(max=1),  # label 0 of the first image is wrong for the model
        "path": [f"{index}.png" for index in range(count)],
    }
    parts = [{key: value[start : start + size] for key, value in whole.items()} for start in range(0, count, size)]
    return [{key: part[key] for key in ("image", "path", *known)} for part in parts]


@pytest.fixture(scope="module")
def scores():
    methods = {"true": TrueMap(), "wrong": Fixed((~PLACE).float()), "flat": Fixed(torch.zeros(3, 4))}
    with pytest.warns(match="fixed heatmaps of nothing are zero and show nothing"):
        return score(Patch(PLACE), batches(), methods, steps=6)


def test_only_the_true_map_beats_every_control(scores):
    assert scores.unbeaten("true") == []
    assert scores.unbeaten("wrong") == list(DEFAULT_METRICS)
    assert scores.unbeaten("flat") == list(DEFAULT_METRICS)
    assert scores.controls["true"] == ("random 12×16", "centre", "edges 12×16")
    assert scores.controls["flat"] == ("random 3×4", "centre", "edges 3×4")
    for metric in DEFAULT_METRICS:
        better = METRICS[metric]
        best = max(scores.values, key=lambda name: better * scores.estimate(name, metric).value)
        assert best == "true", metric
    assert scores.accuracy == pytest.approx(23 / 24)
    assert scores.paths == tuple(f"{index}.png" for index in range(24))


def test_the_table_has_methods_first_then_controls(scores):
    rows = scores.table()
    assert [row["name"] for row in rows[:3]] == ["true", "wrong", "flat"]
    assert [row["kind"] for row in rows] == ["method"] * 3 + ["control"] * 5
    assert rows[0]["unbeaten"] == []
    assert rows[0]["verdict"] == "beats every control in every metric"
    assert (rows[1]["energy"], rows[1]["energy_low"], rows[1]["energy_high"]) == scores.estimate("wrong", "energy")
    assert "unbeaten" not in rows[-1]


def test_a_notebook_shows_the_table_with_a_sign_for_ties_and_losses(scores):
    page = scores._repr_html_()
    rows = {re.sub("<[^>]+>", "", row.split("</th>")[0]): row for row in page.split("<tr>")[2:]}
    assert list(rows) == [row["name"] for row in scores.table()]
    assert re.search("[=✗]", re.sub("<[^>]+>", "", rows["true"])) is None
    assert rows["wrong"].count("✗") == sum(scores.sign("wrong", metric) == "✗" for metric in DEFAULT_METRICS) > 0
    assert "<td>control</td>" in rows["centre"]
    for name in scores.values:
        for metric in DEFAULT_METRICS:
            value, low, high = scores.estimate(name, metric)
            mean, half = (f"{number:.2f}".removeprefix("0") for number in (value, (high - low) / 2))
            sign = scores.sign(name, metric).strip() if name in scores.controls else ""
            assert f"<td>{mean}±{half}{sign}</td>" in rows[name]
    assert "over 24 images" in page


def test_print_shows_the_table_with_intervals_and_the_verdicts(scores):
    heading, *lines = str(scores).splitlines()
    assert re.findall(r"(\w+) [↑↓]", heading) == list(DEFAULT_METRICS)
    rows = {re.split(r"  +", line)[0]: line for line in lines[: len(scores.values)]}
    assert list(rows) == [row["name"] for row in scores.table()]
    for name, line in rows.items():
        for metric in DEFAULT_METRICS:
            assert str(scores.estimate(name, metric)) in line
    assert lines[len(rows) : len(rows) + 3] == [f"{name} {scores.verdict(name)}" for name in scores.controls]
    assert "over 24 images" in lines[-2]
    assert lines[-1] == "The model's accuracy on these images is 0.958."


def test_road_saco_and_grids_are_measured_if_asked_for():
    images = [{"image": models.pictures(batch=12), "box": torch.tensor([[4.0, 4, 40, 40]]).expand(12, -1)}]
    model, methods = models.resnet(), {"gradcam": METHODS["gradcam"]()}
    found = score(model, images, methods, metrics=["saco", "road", "energy"], steps=2)
    assert found.metrics == ["road", "saco", "energy"]
    target = model.eval()(images[0]["image"]).argmax(1)
    heatmaps = METHODS["gradcam"]()(model, images[0]["image"], target=target).heatmaps
    for metric, function in (("road", road), ("saco", saco)):
        single = function(model, images[0]["image"], heatmaps, target=target)
        np.testing.assert_allclose(found.values["gradcam"][metric], single, atol=1e-5)
    assert len(target.unique()) == 1 or found.values["gradcam"].keys() == {"road", "saco", "energy"}


def test_grids_need_images_of_several_classes():
    class Channel(torch.nn.Module):  # the class is the brightest channel
        def forward(self, images_BCHW):
            return 9 * images_BCHW.mean((2, 3))

    class Shown(Method):
        name = "shown"

        def explain(self, model, images_BCHW, target):
            return Explanation(images_BCHW[torch.arange(len(images_BCHW)), target], model(images_BCHW), None, "channel")

    images = torch.rand(12, 3, 8, 8) / 4
    images[torch.arange(12), torch.arange(12) % 3] += 0.5
    alone = images[:1]
    found = score(Channel(), [{"image": images}, {"image": alone}], {"m": Shown()}, metrics=["grid"], steps=2)
    assert found.estimate("m", "grid").value > 0.5
    assert np.isnan(found.values["m"]["grid"]).tolist() == [False] * 12 + [True]  # a batch of one image has no grid
    assert found.outcome("m", "centre", "grid") == "beats"


def test_table_and_to_dict_have_the_metrics_of_every_method(scores):
    columns = {key for row in scores.table() for key in row}
    assert columns == {"name", "kind", "unbeaten", "verdict"} | {
        f"{metric}{bound}" for metric in DEFAULT_METRICS for bound in ("", "_low", "_high")
    }
    assert all(isinstance(row[metric], float) for row in scores.table() for metric in DEFAULT_METRICS)
    as_dict = json.loads(json.dumps(scores.to_dict()))
    assert as_dict["table"] == scores.table()
    assert as_dict["images"] == 24
    assert as_dict["values"]["true"]["energy"] == scores.of_images("true", "energy").tolist()


def test_scores_are_pickled_without_their_resamples(scores):
    scores.estimate("true", "energy")  # computes and caches the resamples
    data = pickle.dumps(scores)
    unpickled = pickle.loads(data)
    size_of_values = sum(values.nbytes for metrics in scores.values.values() for values in metrics.values())
    assert len(data) < size_of_values + 10_000 < scores._weights.nbytes
    assert unpickled.table() == scores.table()
    assert repr(unpickled) == repr(scores)


def test_metrics_equal_those_of_the_single_functions(scores):
    images, target = torch.cat([batch["image"] for batch in batches()]), torch.ones(24, dtype=torch.long)
    maps = {
        "true": PLACE.float().expand(24, -1, -1),
        "random 3×4": RandomMap((3, 4))(Patch(PLACE), images).heatmaps,
        "centre": CentreGaussian()(Patch(PLACE), images).heatmaps,
        "edges 12×16": Edges((12, 16))(Patch(PLACE), images).heatmaps,
    }
    objects = PLACE.expand(24, -1, -1)
    for name, heatmaps in maps.items():
        if name != "true":  # the true map has equal pixels, whose random order changes the curves
            for metric, curve in (("deletion", deletion), ("insertion", insertion)):
                auc = curve(Patch(PLACE), images, heatmaps, target=target, steps=6).auc
                np.testing.assert_allclose(scores.values[name][metric], auc.numpy(), atol=1e-5)
        np.testing.assert_allclose(scores.values[name]["pointing"], hit_share(heatmaps, objects))
        np.testing.assert_allclose(scores.values[name]["energy"], energy(heatmaps, objects), atol=1e-6)
        np.testing.assert_allclose(scores.values[name]["iou"], overlap(heatmaps, objects), atol=1e-6)
    assert (scores.values["centre"]["shuffled"] == 1).all()
    assert (scores.values["random 3×4"]["shuffled"] == 1).all()


def test_box_and_mask_replace_each_other_when_one_is_missing():
    box = torch.tensor([0.0, 0, 5, 12])
    images = [{**batch, "box": box.expand(len(batch["image"]), -1)} for batch in batches()]
    method = {"true": TrueMap()}
    with_both = score(Patch(PLACE), images, method, steps=2).values["true"]
    only_box, only_mask = (
        score(Patch(PLACE), [{k: v for k, v in batch.items() if k != missing} for batch in images], method, steps=2)
        for missing in ("mask", "box")
    )
    in_box = inside(box[None], (12, 16)).expand(24, -1, -1)
    np.testing.assert_allclose(with_both["energy"], energy(PLACE.float().expand(24, -1, -1), in_box), atol=1e-6)
    np.testing.assert_allclose(with_both["energy"], only_box.values["true"]["energy"])
    np.testing.assert_allclose(with_both["iou"], only_mask.values["true"]["iou"])
    iou = (PLACE & in_box[0]).sum() / (PLACE | in_box[0]).sum()
    np.testing.assert_allclose(only_box.values["true"]["iou"][0, 1], iou)
    assert (only_mask.values["true"]["energy"] == 1).all()


def test_without_boxes_and_masks_there_are_no_localisation_metrics():
    found = score(Patch(PLACE), batches(known=()), {"true": TrueMap()}, steps=3)
    assert found.metrics == ["deletion", "insertion", "shuffled"]
    assert found.accuracy is None
    assert found.unbeaten("true") == []


@pytest.mark.parametrize("count", [1, 3])
def test_fewer_than_ten_images_give_no_interval_and_no_method_beats_a_control(count):
    found = score(Patch(PLACE), batches(count), {"true": TrueMap()}, steps=3)
    estimate = found.estimate("true", "energy")
    assert estimate.value == 1
    assert np.isnan(estimate[1:]).all()
    assert not found.decided
    assert found.unbeaten("true") == list(DEFAULT_METRICS)


def test_the_same_seed_gives_the_same_scores():
    methods = {"gate": METHODS["gate"](), "gradcam": METHODS["gradcam"]()}
    model = models.resnet("resnet10t", block_args={"attn_layer": "cbam"})
    images = [{"image": models.pictures(batch=4, seed=seed)} for seed in range(3)]
    first, second, other_seed = (score(model, images, methods, steps=2, seed=seed).table() for seed in (0, 0, 1))
    assert first == second
    assert first != other_seed


# Real models, and errors -------------------------------------------------------------------------------------------


def test_score_leaves_the_model_unchanged_and_uses_every_method_that_fits():
    model = models.vit().train()
    images = [{"image": models.pictures(batch=2)}]
    before = state_of(model)
    found = score(model, images, steps=2, copies=1)
    assert_same_state(before, state_of(model))
    assert list(found.controls) == list(methods_that_fit(model, images[0]["image"]))
    assert "scorecam" not in found.controls
    assert {"raw", "rollout", "gradcam", "chefer"} <= found.controls.keys()


def test_shuffled_is_near_1_for_a_method_that_ignores_the_weights_and_low_for_gradcam():
    model = models.vit(depth=4)
    batch = {"image": models.pictures(batch=12)}
    found = score(model, [batch], {"gradcam": METHODS["gradcam"](), "image": Edges((4, 4))}, steps=2)
    assert not found.beats("image", "shuffled")
    assert found.estimate("image", "shuffled").value == pytest.approx(1)
    assert found.beats("gradcam", "shuffled")
    assert found.estimate("gradcam", "shuffled").high < 0.5


def test_shuffled_is_1_if_shuffling_only_inverts_the_map():
    model = Patch(PLACE)

    class Brightness(Method):
        name = "brightness"

        def explain(self, network, images_BCHW, target):
            sign = 1 if network is model else -1
            return Explanation(sign * images_BCHW.mean(1), network(images_BCHW), None, "pixels")

    found = score(model, batches(), {"brightness": Brightness()}, steps=2)
    assert found.estimate("brightness", "shuffled").value == pytest.approx(1)


def test_a_method_that_fails_is_reported_and_the_others_are_scored():
    methods = {"gate": METHODS["gate"](), "true": TrueMap()}
    found = score(Patch(PLACE), batches(), methods, steps=2)
    assert list(found.controls) == ["true"]
    assert "gate needs gates over positions" in found.failed["gate"]
    with pytest.raises(UsageError, match="gate needs gates over positions"):
        score(Patch(PLACE), batches(), {"gate": METHODS["gate"]()}, steps=2)


def test_progress_is_reported_in_fractions_of_batches():
    reported = []
    score(Patch(PLACE), batches(count=7), {"true": TrueMap()}, steps=2, advance=reported.append)
    assert sum(reported) == pytest.approx(7)
    assert max(reported) < 5  # a whole batch has 5 images


def test_wrong_inputs_of_score_are_errors():
    model, method = Patch(PLACE), {"true": TrueMap()}
    refuses(DataError, "there are no images to score", score, model, [], method)
    refuses(UsageError, "there is no method to score", lambda: score(model, batches(), {}))
    mixed = [*batches(), *batches(known=("label",))]
    with pytest.raises(
        UsageError, match=r"batches differ: images of \(3, 12, 16\) with label after .* box, label, mask"
    ):
        score(model, mixed, method, steps=2)
    refuses(UsageError, "no metric 'rode'. Nearest: road", score, model, batches(), method, metrics=["rode"])
    message = "iou cannot be measured, since the images have no boxes or masks"
    refuses(UsageError, message, score, model, batches(known=()), method, metrics=["iou"])
    for wrong in ({"copies": 0}, {"steps": 1}):  # with a single step, all maps have the same curve
        with pytest.raises(UsageError, match="copies must be ≥ 1 and steps ≥ 2"):
            score(model, batches(), method, **wrong)
    for seed in (-1, 2**32):
        with pytest.raises(UsageError, match="seed must be in"):
            score(model, batches(), method, seed=seed)
    with pytest.raises(UsageError, match="'centre' is the name of a control"):
        score(model, batches(), {"centre": TrueMap()}, steps=2)
    with torch.no_grad():
        model.bias.fill_(torch.nan)
    refuses(DataError, "output is not finite; bias holds NaN", lambda: score(model, batches(), method))


def test_scores_under_inference_mode_are_the_same():
    model, methods = Patch(PLACE), {"true": TrueMap()}
    with torch.inference_mode():
        inside_mode = score(model, batches(), methods, steps=4)
    assert inside_mode.estimate("true", "deletion") == score(Patch(PLACE), batches(), methods, steps=4).estimate(
        "true", "deletion"
    )


def test_expected_time_and_progress_count_the_forward_passes_of_each_method():
    """Score-CAM of C channels runs the model C + 1 times for an image, on the model and 3 shuffled copies."""
    torch.manual_seed(0)
    model = timm.create_model("test_resnet").eval()
    images = torch.randn(3, 3, 64, 64)
    methods = {"scorecam": METHODS["scorecam"]("layer4"), "gradcam": METHODS["gradcam"]("layer4")}
    channels = model.forward_features(images).shape[1]
    expected, reported = [], []
    found = score(model, [{"image": images}] * 2, methods, steps=2, advance=reported.append, expect=expected.append)
    (seconds,) = expected  # once for all batches
    passes = {"scorecam": 4 * (1 + channels) + 2, "gradcam": 4 * 3 + 2, "controls": 3 * 2}
    assert seconds.keys() == passes.keys()
    for name, count in passes.items():
        assert seconds[name] / seconds["controls"] == pytest.approx(count / passes["controls"])
    assert sum(reported) == pytest.approx(6)
    assert reported[0] == pytest.approx(4 * (1 + channels) / sum(passes.values()))  # after one image of Score-CAM
    whole = methods["scorecam"](model, images, target=model(images).argmax(1)).heatmaps
    curve = deletion(model, images, whole, steps=2)
    np.testing.assert_allclose(found.values["scorecam"]["deletion"][:3], curve.auc, atol=1e-4)
