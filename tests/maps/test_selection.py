"""The default method of a model."""

import pytest

from tests.capture import models
from visionattn.maps import default_method


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (models.vit, "raw"),
        (models.torchvision_vit, "raw"),
        (models.resnet, "gradcam"),
        (models.swin, "gradcam"),
        (lambda: models.vit(class_token=False, global_pool="avg"), "gradcam"),
    ],
)
def test_the_default_method_depends_on_the_last_attention(make, name):
    model = make().train()
    assert default_method(model, models.pictures(32 if "Swin" in type(model).__name__ else 64)).name == name
    assert model.training


def test_the_example_has_the_image_size_of_the_model():
    assert default_method(models.vit(img_size=(32, 80))).name == "raw"
