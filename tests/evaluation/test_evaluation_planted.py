"""The images with planted evidence of tests/benchmarks, and the rank correlation that its table reports."""

import numpy as np
import pytest
import scipy.stats
import torch

from tests.benchmarks.judge import correlation
from tests.benchmarks.planted import CLASSES, MARK, SIDE, Planted, stripes, trained


@pytest.mark.parametrize(
    ("kinds", "label"),
    [
        ((), "nothing"),
        (("horizontal",), "horizontal"),
        (("vertical", "vertical"), "vertical"),
        (("horizontal", "vertical"), "together"),
    ],
)
def test_the_evidence_is_the_marks_and_they_give_the_class(kinds, label):
    data = Planted("test", 3)
    for number in range(20):
        image, found, evidence = data.draw(number, kinds=kinds)
        assert CLASSES[found] == label
        assert evidence.shape == (len(kinds), SIDE, SIDE)
        for kind, mask in zip(kinds, evidence, strict=True):
            np.testing.assert_array_equal(image[mask].reshape(MARK, MARK), stripes(kind))
        assert evidence.sum() == len(kinds) * MARK**2  # marks do not overlap
        without = data.draw(number, kinds=kinds)[0]
        np.testing.assert_array_equal(image, without)  # the number determines the image
        decoys = (image != data.digits.draw(number % 3)[0]) & ~evidence.any(0)
        assert 0 < decoys.sum() <= 2 * MARK**2


def test_every_class_is_frequent_and_decoys_have_a_higher_contrast_than_marks():
    data = Planted("train", 3)
    labels = [data.draw(number)[1] for number in range(400)]
    assert np.bincount(labels, minlength=4).min() > 60
    assert (stripes("horizontal") == stripes("vertical").T).all()
    assert stripes("diagonal").std() > stripes("horizontal").std()


def test_the_correlation_is_spearmans():
    random = np.random.default_rng(0)
    a, b = random.integers(0, 5, (6, 12)), random.random((6, 12))
    expected = [scipy.stats.spearmanr(*rows).statistic for rows in zip(a, b, strict=True)]
    np.testing.assert_allclose(correlation(a, b), expected)


def test_a_killed_training_goes_on_with_the_same_weights(tmp_path, monkeypatch):
    for name, value in {"DIGITS": 20, "BATCH": 4, "SAVED": 2, "CHECKED": 3, "VALIDATED": 10}.items():
        monkeypatch.setattr(f"tests.benchmarks.planted.{name}", value)
    monkeypatch.setattr("tests.benchmarks.planted.STEPS", {"vit": 5})
    whole = trained("vit", tmp_path / "whole", log=lambda line: None)

    def kill(line):
        if "step 3" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trained("vit", tmp_path / "killed", log=kill)
    assert not torch.load(tmp_path / "killed" / "vit-0.pt")["done"]
    again = trained("vit", tmp_path / "killed", log=lambda line: None)
    for one, other in zip(whole.state_dict().values(), again.state_dict().values(), strict=True):
        torch.testing.assert_close(one, other)
