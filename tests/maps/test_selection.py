"""The default method of a model."""

from functools import partial

import pytest
import torch

from tests.capture import models
from visionattn.attention import NonLocal, insert
from visionattn.capture import survey_images
from visionattn.errors import MapWarning
from visionattn.maps import METHODS, default_method, default_note, make_method


def with_attention(model):
    """Insert two layers of attention over all positions into a convolutional network."""
    insert(model, NonLocal, at=["layer3", "layer4"])
    return model


class Normaliser(torch.nn.Module):
    """Normalises images, without any weights."""

    def forward(self, images):
        return (images - 0.5) / 0.25


def behind_a_normaliser(model):
    return torch.nn.Sequential(Normaliser(), model)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (models.vit, "rollout"),
        (models.torchvision_vit, "rollout"),
        (partial(models.vit, depth=1), "raw"),  # a single layer
        (models.resnet, "gradcam"),
        (models.swin, "rollout"),  # approximate, with a warning
        (lambda: models.vit(class_token=False, global_pool="avg"), "rollout"),
        (lambda: behind_a_normaliser(models.vit(class_token=False, global_pool="avg")), "rollout"),
        (lambda: behind_a_normaliser(models.resnet()), "gradcam"),
        (lambda: with_attention(models.resnet()), "gradcam"),  # attention between convolutions
    ],
)
def test_the_default_method_depends_on_the_attention(make, name):
    model = make().train()
    assert default_method(model, models.pictures(32 if "Swin" in type(model).__name__ else 64)).name == name
    assert model.training


def test_the_default_method_of_a_vit_gives_no_warning(recwarn):
    model, images = models.vit().eval(), models.pictures()
    with torch.no_grad():
        assert default_method(model, images)(model, images).heatmaps.isfinite().all()
    assert not [warning for warning in recwarn if issubclass(warning.category, MapWarning)]


def test_the_default_of_each_kind_of_model_fits_it():
    for make in (models.vit, models.resnet, models.swin):
        model = make().eval()
        images = models.pictures(32 if make is models.swin else 64)
        kind = METHODS[default_method(model, images).name]
        assert kind.fits(survey_images(model, images))


def test_the_example_has_the_image_size_of_the_model():
    assert default_method(models.vit(img_size=(32, 80))).name == "rollout"


def test_a_layer_without_a_method_is_a_layer_of_attention_in_a_vit():
    method = make_method(None, 1, models.vit(), models.pictures())
    assert (method.name, method.layer) == ("raw", 1)


def test_only_a_default_that_did_not_beat_the_controls_has_a_note():
    assert "did not beat every control" in default_note("gradcam")
    assert default_note("rollout") == default_note("gaze") == default_note("") == ""
