"""The error of a method that does not fit a model names the methods that fit."""

import re

import pytest

from tests.capture import models
from visionattn.errors import UsageError
from visionattn.maps import METHODS, RawAttention, methods_that_fit

ATTENTION = ["raw", "rollout", "chefer", "grad_rollout", "grad_attention", "value_norm", "dino"]


@pytest.mark.parametrize("name", ATTENTION)
def test_the_error_of_a_model_without_attention_names_the_methods_that_fit(name):
    message = rf"{name} needs attention over positions; this ResNet has none\. Methods that fit: (.+)\."
    with pytest.raises(UsageError) as caught:
        METHODS[name]()(models.resnet(), models.pictures())
    fitting = re.fullmatch(message, str(caught.value))[1].split(", ")
    assert {"eigencam", "gradcam", "layercam"} <= set(fitting)
    assert not {"raw", "rollout", "gate"} & set(fitting)


def test_every_method_that_the_error_names_fits_the_model():
    model, images = models.resnet("seresnet18"), models.pictures()
    with pytest.raises(UsageError) as caught:
        RawAttention()(model, images)
    for name in str(caught.value).partition("fit: ")[2].rstrip(".").split(", "):
        assert METHODS[name]()(model, images).raw.isfinite().all()


def test_the_methods_that_fit_a_vit_and_a_resnet():
    cams = ["eigencam", "finercam", "gradcam", "gradcam++", "hirescam", "layercam", "xgradcam"]
    attention = (
        "dino raw rollout token_rank value_norm beyond_intuition chefer grad_attention grad_rollout legrad tokentm"
    )
    assert list(methods_that_fit(models.vit(), models.pictures())) == [*attention.split(), *cams]
    assert list(methods_that_fit(models.resnet(), models.pictures())) == cams
