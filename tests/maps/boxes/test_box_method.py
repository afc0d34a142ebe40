"""Boxes are selected by score, the detector stays unchanged, and results can be printed and pickled."""

import json
import pickle

import pytest
import torch

from tests.maps.boxes.toy import ToyDetector
from tests.models.detectors.small import batch, dense
from visionattn.maps import ODAM, BoxHeatmaps

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


def test_boxes_with_a_score_below_min_score_have_no_map():
    explained = ODAM()(ToyDetector(), torch.zeros(1, 3, 4, 6), min_score=0.6)[0]
    assert explained.heatmaps.shape == (0, 4, 6)
    assert len(explained.boxes) == len(explained.scores) == 0
    assert len(ODAM()(ToyDetector(), torch.zeros(1, 3, 4, 6), max_boxes=1)[0].scores) == 1


def test_the_detector_is_unchanged_afterwards():
    detector = dense().train()
    images, *_ = batch(2)
    with torch.inference_mode():
        ODAM()(detector, images, min_score=0.0, max_boxes=2)
    assert detector.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in detector.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in detector.features.modules())
    state = {name: value.clone() for name, value in detector.state_dict().items()}
    ODAM()(detector, images, min_score=0.0, max_boxes=2)
    assert all(torch.equal(value, state[name]) for name, value in detector.state_dict().items())


def test_heatmaps_of_boxes_print_each_box_and_are_pickled_at_their_own_size():
    (maps, _) = ODAM()(ToyDetector(), torch.rand(2, 3, 4, 6), min_score=0.0)
    first, *lines = str(maps).splitlines()
    assert first == f"BoxHeatmaps(odam of {maps.source}, 2 boxes)"
    assert lines[0].startswith(
        f"  label 0, score {float(maps.scores[0]):.2f}, box (2, 1, 4, 2): peak at row 1, column "
    )
    assert maps._repr_png_().startswith(b"\x89PNG")
    plain_data = json.loads(json.dumps(maps.to_dict()))
    assert plain_data["boxes"] == maps.boxes.tolist()
    whole = torch.rand(400, 4, 6)
    part = BoxHeatmaps(maps.boxes[:1], maps.scores[:1], maps.labels[:1], whole[:1], whole[:1], "", "")
    data = pickle.dumps(part)
    assert len(data) < whole.nbytes / 4
    assert repr(pickle.loads(data)) == repr(part)
    none = BoxHeatmaps(maps.boxes[:0], maps.scores[:0], maps.labels[:0], whole[:0], whole[:0], "", "")
    assert repr(none) == "BoxHeatmaps( of , 0 boxes)"
    assert none._repr_png_() is None
