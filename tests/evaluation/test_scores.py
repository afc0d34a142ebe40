"""Intervals of scores equal SciPy's bootstrap or a slow loop, and verdicts name what a method beats."""

import json

import numpy as np
import pytest
import scipy.stats

from tests.versions import needs
from visionattn.evaluation import MIN_IMAGES, Scores


def scores_of(values, controls, seed=0, resamples=4000):
    return Scores(values, controls, {}, None, (), seed, resamples)


@needs("scipy", "1.15", "the argument rng of bootstrap")
@pytest.mark.parametrize("count", [12, 150])
def test_intervals_equal_scipys_bootstrap(count):
    random = np.random.default_rng(1)
    a, b = random.random(count) ** 2, random.random(count)
    found = scores_of({"a": {"insertion": a}, "b": {"insertion": b}}, {"a": ("b",)})
    options = {"n_resamples": 4000, "method": "percentile", "rng": np.random.default_rng(2)}
    for estimate, values in ((found.estimate("a", "insertion"), a), (found.margin("a", "b", "insertion"), a - b)):
        expected = scipy.stats.bootstrap((values,), np.mean, **options)
        width = expected.confidence_interval.high - expected.confidence_interval.low
        assert estimate.value == pytest.approx(values.mean(), abs=1e-6)
        assert estimate.low == pytest.approx(expected.confidence_interval.low, abs=0.06 * width)
        assert estimate.high == pytest.approx(expected.confidence_interval.high, abs=0.06 * width)


def test_every_resample_chooses_its_own_threshold():
    random = np.random.default_rng(0)
    overlaps = random.random((20, 7)).astype(np.float32)
    found = scores_of({"a": {"iou": overlaps}}, {}).estimate("a", "iou")
    means = []
    for _ in range(4000):
        drawn = overlaps[random.integers(0, 20, 20)]
        means.append(max(drawn[:, t].mean() for t in range(7)))
    assert found.value == pytest.approx(max(overlaps[:, t].mean() for t in range(7)))
    assert found[1:] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)


def test_a_method_beats_a_control_by_the_paired_difference():
    random = np.random.default_rng(0)
    control = random.random(50).astype(np.float32)
    method = control - 0.02 + 0.01 * random.random(50).astype(np.float32)  # a little lower on every single image
    values = {"m": {"deletion": method, "insertion": method}, "c": {"deletion": control, "insertion": control}}
    found = scores_of(values, {"m": ("c",)})
    # the two intervals overlap, but the interval of the paired difference does not contain 0
    assert found.estimate("m", "deletion").high > found.estimate("c", "deletion").low
    assert found.unbeaten("m") == ["insertion"]  # a lower deletion is better, a lower insertion is worse


def test_a_method_must_beat_each_of_its_controls():
    values = {
        name: {"energy": np.full(20, level, np.float32)} for name, level in {"m": 0.5, "a": 0.2, "b": 0.6}.items()
    }
    assert scores_of(values, {"m": ("a",)}).beats("m", "energy")
    assert not scores_of(values, {"m": ("a", "b")}).beats("m", "energy")
    assert not scores_of(values, {"m": ("m",)}).beats("m", "energy")  # equal values do not beat each other


def test_resamples_of_many_images_use_4_bytes_per_image():
    values = {"true": {"deletion": np.linspace(0, 1, 3_000, dtype=np.float32)}}
    many = Scores(values, {"true": ()}, {}, None, (), seed=0)
    assert many._weights.nbytes == 2_001 * 3_000 * 4
    found = many.estimate("true", "deletion")
    assert found.value == pytest.approx(0.5, abs=1e-6)
    assert (found.high - found.low) / 2 == pytest.approx(
        1.96 * np.std(values["true"]["deletion"]) / 3_000**0.5, rel=0.1
    )


def test_markup_in_names_is_escaped():
    shown = scores_of({"<b>": {"energy": np.ones(3, np.float32)}}, {"<b>": ()})._repr_html_()
    assert "<b>" not in shown
    assert "needs at least 10 images; got 3" in shown
    assert "✓" not in shown


# Verdicts ----------------------------------------------------------------------------------------------------------


def levels(count=20, **values):
    """Return Scores of a method `m` and controls: name → metric → the same value for every image, or an array."""
    arrays = {
        name: {metric: np.broadcast_to(value, count).astype(np.float32) for metric, value in metrics.items()}
        for name, metrics in values.items()
    }
    return scores_of(arrays, {"m": tuple(name for name in arrays if name != "m")})


def test_a_verdict_names_the_metrics_and_the_controls():
    noise = np.linspace(-1, 1, 20)
    found = levels(
        m={"deletion": 0.2, "insertion": 0.6, "energy": 0.5, "iou": 0.3},
        centre={"deletion": 0.4, "insertion": 0.6 + noise, "energy": 0.1, "iou": 0.3 + noise},
        edges={"deletion": 0.3, "insertion": 0.7, "energy": 0.1, "iou": 0.2},
    )
    assert found.outcome("m", "centre", "deletion") == "beats"
    assert found.outcomes("m", "insertion") == {"beats": [], "ties with": ["centre"], "loses to": ["edges"]}
    assert (
        found.verdict("m") == "beats every control in deletion and energy; ties with centre in insertion and iou; "
        "loses to edges in insertion"
    )
    assert [found.sign("m", metric) for metric in found.metrics] == [" ", "✗", " ", "="]
    assert found.verdicts() == [f"m {found.verdict('m')}"]
    assert found.unbeaten("m") == ["insertion", "iou"]
    row = found.table()[0]
    assert row["verdict"] == found.verdict("m")


def test_equal_values_are_a_tie_and_no_loss():
    found = levels(m={"deletion": 0.16}, centre={"deletion": 0.16})
    assert found.verdict("m") == "ties with centre in deletion"
    assert "✗" not in str(found).split("no sign")[0]


def test_without_enough_images_there_is_no_verdict():
    found = levels(MIN_IMAGES - 1, m={"deletion": 0.1}, centre={"deletion": 0.9})
    assert found.outcome("m", "centre", "deletion") is None
    assert found.verdict("m") == ""
    assert found.verdicts() == []
    assert found.sign("m", "deletion") == " "


def test_images_without_a_value_count_in_no_mean():
    random = np.random.default_rng(0)
    values, control = random.random(40), random.random(40)
    values[5:15] = control[5:15] = np.nan
    found = levels(40, m={"grid": values}, c={"grid": control})
    known = levels(30, m={"grid": values[~np.isnan(values)]}, c={"grid": control[~np.isnan(control)]})
    for of in (lambda scores: scores.estimate("m", "grid"), lambda scores: scores.margin("m", "c", "grid")):
        assert of(found).value == pytest.approx(of(known).value, abs=1e-6)
        assert of(found)[1:] == pytest.approx(of(known)[1:], abs=0.02)
    assert found.measured("m", "grid")
    few = levels(40, m={"grid": np.where(np.arange(40) < 9, values[20], np.nan)}, c={"grid": control})
    assert np.isnan(few.estimate("m", "grid").low)
    assert few.outcome("m", "c", "grid") is None
    assert json.loads(json.dumps(found.to_dict()))["table"][0]["name"] == "m"


def test_a_method_and_a_control_are_compared_on_the_images_that_both_have():
    method, control = np.arange(20.0), np.arange(20.0) - 1
    method[0], control[1] = np.nan, np.nan
    found = scores_of({"a": {"grid": method}, "b": {"grid": control}}, {"a": ("b",)})
    assert tuple(found.margin("a", "b", "grid")) == pytest.approx((1, 1, 1), abs=1e-5)
    assert found.estimate("a", "grid").value == pytest.approx(np.nanmean(method), abs=1e-5)


def test_a_verdict_claims_every_metric_only_if_every_metric_was_measured():
    higher, lower, missing = np.arange(20.0) + 1, np.arange(20.0), np.full(20, np.nan)
    values = {"a": {"insertion": higher, "energy": higher}, "b": {"insertion": lower, "energy": lower}}
    assert scores_of(values, {"a": ("b",)}).verdict("a") == "beats every control in every metric"
    values["a"]["grid"], values["b"]["grid"] = missing, lower
    assert scores_of(values, {"a": ("b",)}).verdict("a") == "beats every control in insertion and energy"
