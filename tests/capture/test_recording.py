"""A capture raises an error if the model ran but nothing was recorded."""

import pytest
from torch import nn

from tests.capture import models
from tests.capture.homemade import HomemadeAttention
from tests.capture.models import BrokenError
from visionattn.capture import capture
from visionattn.errors import UsageError


def test_attention_that_cannot_be_recorded_is_an_error_that_names_the_module():
    net = nn.Sequential()
    net.add_module("mine", HomemadeAttention())
    with pytest.raises(UsageError, match="mine looks like attention but calls neither"), capture(net):
        net(models.pictures(32))


def test_a_model_that_is_never_called_gives_no_error_and_no_records():
    with capture(models.vit(depth=1)) as records:
        pass
    assert len(records) == 0
    assert records.calls == 0


def test_an_exception_in_the_body_is_raised_instead_of_the_error_of_an_empty_capture():
    model = models.resnet()
    with pytest.raises(BrokenError), capture(model) as records:  # noqa: PT012 - the body is what is tested
        model(models.pictures())
        assert len(records) == 0
        raise BrokenError
