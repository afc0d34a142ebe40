"""A pickled result takes only the space of its own data, and plain data can be written as JSON."""

import json
import pickle

import numpy as np
import pytest
import torch

from tests.capture import models
from visionattn.capture import FullAttention, Record, capture, survey_images
from visionattn.capture.results import compact_state, to_plain


class Result:
    def __init__(self, **attributes):
        vars(self).update(attributes)


def test_slices_get_a_storage_of_their_own_size():
    whole = torch.rand(1000, 8)
    state = compact_state(Result(part=whole[:2], nested={"rows": [whole[3:4]], "pair": (whole[:, 0],)}, _cached=whole))
    assert state.keys() == {"part", "nested"}
    for part, expected in (
        (state["part"], whole[:2]),
        (state["nested"]["rows"][0], whole[3:4]),
        (state["nested"]["pair"][0], whole[:, 0]),
    ):
        assert torch.equal(part, expected)
        assert part.untyped_storage().nbytes() == part.nbytes
    assert compact_state(Result(whole=whole))["whole"] is whole


def test_plain_data_can_be_written_as_json():
    value = {"a": torch.tensor([[1.0, 2.0]]), 3: (np.arange(2), np.float32(0.5)), "none": None, "set": {1}}
    assert json.loads(json.dumps(to_plain(value))) == {"a": [[1.0, 2.0]], "3": [[0, 1], 0.5], "none": None, "set": [1]}
    with pytest.raises(TypeError, match="cannot convert a Result to plain data"):
        to_plain({"a": Result()})


def test_records_print_the_range_of_their_weights_and_convert_to_plain_data():
    model = models.vit()
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(models.pictures(batch=2))
    record = records[0]
    low, high = (float(bound) for bound in record.weights.aminmax())
    assert str(record).splitlines() == [repr(record), f"  weights {low:.3g} to {high:.3g}, mean 0.0588"]  # 1 / 17 keys
    assert "  blocks.0.attn: self, grid 4×4, 3 heads" in str(records)
    assert record._repr_png_().startswith(b"\x89PNG")
    assert records._repr_png_().startswith(b"\x89PNG")
    plain_data = json.loads(json.dumps(records.to_dict()))
    assert plain_data["calls"] == 1
    assert [part["name"] for part in plain_data["records"]] == [part.name for part in records]
    np.testing.assert_allclose(plain_data["records"][0]["weights"], record.weights)
    assert plain_data["records"][0]["key_cells"] == [[-1, *range(16)]]


def test_a_record_is_pickled_at_the_size_of_its_weights():
    whole = torch.rand(500, 1, 3, 17)
    record = Record("a", "self", (4, 4), 1, 3, None, None, whole[:2], 0)
    data = pickle.dumps(record)
    assert len(data) < whole[:2].nbytes + 2_000 < whole.nbytes
    restored = pickle.loads(data)
    assert torch.equal(restored.weights, record.weights)
    assert repr(restored) == repr(record)


def test_a_survey_prints_its_sites_and_converts_to_plain_data():
    model = models.vit()
    survey = survey_images(model, models.pictures(batch=1))
    lines = repr(survey).splitlines()
    assert lines[1] == "  blocks.0.attn: self, grid 4×4, 3 heads"
    assert "blocks.0.attn: self" in survey._repr_html_()
    plain_data = json.loads(json.dumps(survey.to_dict()))
    assert [site["name"] for site in plain_data["attention"]] == [site.name for site in survey.attention]
    assert plain_data["attention"][0]["grid"] == [4, 4]
    restored = pickle.loads(pickle.dumps(survey))
    assert repr(restored) == repr(survey)
