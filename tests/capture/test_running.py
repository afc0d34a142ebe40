"""Errors of models that cannot run or be captured, which name the right input."""

import pytest
import torch

from tests.capture import models
from tests.refusals import refuses
from visionattn.capture import capture
from visionattn.errors import UsageError
from visionattn.maps import METHODS, GradCAM, RawAttention


@pytest.mark.parametrize("how", [torch.jit.script, lambda model: torch.jit.trace(model, models.pictures())])
@pytest.mark.filterwarnings("ignore")
def test_capture_of_scripted_and_traced_models_is_an_error(how):
    scripted = how(models.vit(depth=1))
    message = "a scripted or traced model cannot be watched; pass the model it was made from"
    for watch in (lambda: capture(scripted), lambda: RawAttention()(scripted, models.pictures())):
        refuses(UsageError, message, watch)


@pytest.mark.parametrize("name", ["raw", "rollout", "chefer", "gradcam", "scorecam"])
@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 3, 48, 48), r"wants images of 3×64×64 and got 3×48×48 \(.*\); resize them, or .* img_size=\(48, 48\)"),
        ((2, 3, 70, 64), "wants images of 3×64×64 and got 3×70×64"),
        ((2, 1, 64, 64), "wants images of 3×64×64 and got 1×64×64"),
    ],
)
def test_images_of_a_wrong_size_are_an_error_that_names_the_right_size(name, shape, message):
    refuses(UsageError, message, lambda: METHODS[name]()(models.vit(), torch.randn(shape)))


def test_the_error_names_the_image_size_of_torchvision_models():
    with pytest.raises(UsageError, match="wants images of 64×64 and got 48×48"):
        GradCAM()(models.torchvision_vit(), models.pictures(48))
