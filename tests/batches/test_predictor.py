"""Rows of predictions equal the model's own outputs."""

import numpy as np
import pytest
import torch

from tests.batches.pictures import make_model, write_pictures
from tests.models.detectors import small
from tests.refusals import refuses
from visionattn.batches import Predictor
from visionattn.data import Preprocess, read_image
from visionattn.errors import UsageError


@pytest.fixture
def paths(tmp_path):
    return [str(path) for path in write_pictures(tmp_path)]


def test_every_row_has_the_most_probable_class_of_the_model(paths):
    model, preprocess = make_model(), Preprocess(160)
    rows = Predictor(model, preprocess=preprocess)({"path": [*paths, "missing.png"]}).to_pylist()
    assert "missing.png" in rows[3]["error"]
    for path, row in zip(paths, rows, strict=False):
        with torch.no_grad():
            probability_K = model(torch.from_numpy(preprocess(read_image(path))[0])[None]).softmax(1)[0]
        index = int(probability_K.argmax())
        assert (row["prediction"], row["class"]) == (index, ["cat", "dog", "bird"][index])
        np.testing.assert_allclose(row["probability"], probability_K[index], atol=1e-5)
        assert row["error"] is row["labels"] is None


def test_independent_labels_are_listed(paths):
    model = make_model()
    model.network.label_threshold = 0.0
    rows = Predictor(model, preprocess=Preprocess(160))({"path": paths}).to_pylist()
    assert all(set(row["labels"]) == {"cat", "dog", "bird"} for row in rows)


def test_detectors_are_refused(paths):
    refuses(
        UsageError,
        "for the boxes of a detector",
        lambda: Predictor(small.dense(), preprocess=Preprocess(64))({"path": paths}),
    )
