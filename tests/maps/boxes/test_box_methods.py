"""The default method of a detector, and methods that do not fit it."""

import pytest
from torch import nn

from tests.models.detectors.small import batch, dense, query
from tests.refusals import refuses
from visionattn.errors import UsageError
from visionattn.maps import (
    ODAM,
    BoxAttention,
    GradCAM,
    QuerySampling,
    RawAttention,
    SameForAllBoxes,
    default_box_method,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


def test_box_methods_that_do_not_fit_the_detector_are_errors():
    images, *_ = batch(1)
    assert isinstance(default_box_method(dense()), ODAM)
    assert isinstance(default_box_method(query()), QuerySampling)
    refuses(UsageError, "this DenseDetector has none; use odam", lambda: QuerySampling()(dense(), images))
    refuses(UsageError, "is not a detector", lambda: ODAM()(nn.Flatten(), images))
    refuses(UsageError, r"no layer 'featuers'\. Nearest: features", lambda: ODAM("featuers")(dense(), images))
    with pytest.raises(
        UsageError, match=r"needs self-attention in features\.backbone: .*has 0 layers of attention; or use odam"
    ):
        BoxAttention()(dense(), images)
    refuses(UsageError, "no scores of the whole image; use odam", lambda: GradCAM()(dense(), images))
    refuses(UsageError, "runs more than once", lambda: ODAM("head.class_tower")(dense(), images))
    refuses(UsageError, "BoxAttention", lambda: SameForAllBoxes(RawAttention()))
    refuses(UsageError, "no part 'backbone'", lambda: BoxAttention("backbone")(dense(), images))
