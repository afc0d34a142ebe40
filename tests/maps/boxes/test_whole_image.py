"""A method for whole images gives every box the same map."""

import pytest
import torch

from tests.models.detectors.small import batch, dense
from visionattn.attention import CBAM
from visionattn.maps import Gate, SameForAllBoxes

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


def test_same_for_all_boxes_repeats_the_map_of_the_gate():
    detector = dense(attention=CBAM, attention_preserve=False)
    images, *_ = batch(1)
    (explained,) = SameForAllBoxes(Gate())(detector, images, min_score=0.0, max_boxes=3)
    gate = Gate()(detector, images)
    for raw in explained.raw:
        torch.testing.assert_close(raw, gate.raw[0])
    assert explained.source.startswith("gate of features.backbone")
