"""A method for whole images gives every box the same map."""

import pytest
import torch

from tests.models.detectors.small import batch, dense
from tests.refusals import refuses
from visionattn.attention import CBAM
from visionattn.errors import UsageError
from visionattn.maps import ODAM, Gate, MaxOverBoxes, SameForAllBoxes

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


def test_same_for_all_boxes_repeats_the_map_of_the_gate():
    detector = dense(attention=CBAM, attention_preserve=False)
    images, *_ = batch(1)
    (explained,) = SameForAllBoxes(Gate())(detector, images, min_score=0.0, max_boxes=3)
    gate = Gate()(detector, images)
    for raw in explained.raw:
        torch.testing.assert_close(raw, gate.raw[0])
    assert explained.source.startswith("gate of features.backbone")


def test_the_target_of_boxes_is_the_index_of_a_class():
    torch.manual_seed(0)
    detector, images = dense().eval(), batch(2)[0]
    method = MaxOverBoxes(ODAM(), min_score=0.0)
    every = method(detector, images)
    label = int(every.output[0]["labels"][0])
    for target in (label, torch.tensor([label]), torch.tensor([label, label])):
        maps = method(detector, images, target=target)
        assert set(maps.output[0]["labels"].tolist()) == {label}
    refuses(
        UsageError,
        "pass its index as target",
        lambda: method(detector, images, target=lambda output: output),
    )
