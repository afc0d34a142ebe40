"""Targets beyond one output match their definitions, in gradients of maps and in errors."""

import types

import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from tests.capture import models
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.maps import Against, Chefer, GradCAM, ImageEncoder, LeGrad, Margin, Region, Similarity
from visionattn.maps.targets import embedding_of

close = torch.testing.assert_close
TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 50}
VISION = {**TEXT, "image_size": 64, "patch_size": 16, "num_hidden_layers": 2}
VISION.pop("vocab_size")


def clip(**vision):
    config = transformers.CLIPConfig(text_config=TEXT, vision_config=VISION | vision, projection_dim=24)
    return models.randomised(transformers.CLIPModel(config))


def siglip():
    return models.randomised(
        transformers.SiglipModel(transformers.SiglipConfig(text_config=TEXT, vision_config=VISION))
    )


class Segmenter(nn.Module):
    """Scores (B, 4, h, w) in a dict, as of torchvision's segmentation networks."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, 2, 1)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, images):
        return {"out": self.head(self.conv(images).relu())}


@pytest.fixture(scope="module")
def segmenter():
    return models.randomised(Segmenter()), models.pictures((16, 24), batch=2)


def test_the_margin_and_the_evidence_against_a_class_are_differences_of_scores():
    output = torch.randn(5, 7)
    close(Margin(2, 5)(output), output[:, 2] - output[:, 5])
    close(Against(3)({"logits": output}), -output[:, 3])


def test_the_map_of_a_margin_is_that_of_the_difference_of_the_rows_of_the_head():
    model, images = models.resnet(), models.pictures(batch=2)
    found = GradCAM()(model, images, target=Margin(1, 4)).raw
    with torch.no_grad():
        model.fc.weight[0] = model.fc.weight[1] - model.fc.weight[4]
        model.fc.bias[0] = 0
    close(found, GradCAM()(model, images, target=0).raw, atol=1e-6, rtol=1e-4)


@pytest.mark.filterwarnings("ignore:.*show nothing")  # one of the two maps may be zero
def test_a_model_with_one_logit_is_explained_for_yes_and_for_no():
    model = models.resnet()
    model.fc = nn.Linear(model.fc.in_features, 1)
    yes, no = (GradCAM()(model, models.pictures(), target=target).raw for target in (0, Against(0)))
    assert yes.max() > 0 or no.max() > 0
    assert not torch.equal(yes, no)


def test_a_region_is_the_mean_over_the_pixels_of_the_class(segmenter):
    model, images = segmenter
    with torch.no_grad():
        scores = model(images)["out"]
    index = int(scores.argmax(1).flatten(1).mode(1).values[0])
    expected = []
    for image in scores:
        values = [
            float(image[index, y, x]) for y in range(8) for x in range(12) if int(image[:, y, x].argmax()) == index
        ]
        expected.append(sum(values) / len(values))
    close(Region(index)({"out": scores}), torch.tensor(expected))
    assert GradCAM("conv")(model, images, target=Region(index)).raw.shape == (2, 8, 12)


@pytest.mark.parametrize("batched", [False, True])
def test_a_mask_of_the_input_is_resampled_to_the_output(segmenter, batched):
    model, images = segmenter
    mask = torch.zeros(2, 16, 24, dtype=torch.uint8)
    mask[0, 5, 9] = mask[0, 6:8, 2:4] = 255  # cells (2, 4) and (3, 1)
    mask[1, 0, 0] = 1
    mask = mask if batched else mask[0]
    scores = model(images)["out"]
    first = (scores[:, 1, 2, 4] + scores[:, 1, 3, 1]) / 2
    expected = torch.stack([first[0], scores[1, 1, 0, 0]]) if batched else first
    close(Region(1, mask)(scores), expected)


@pytest.mark.parametrize(
    ("error", "message", "target"),
    [
        (UsageError, r"target 4 is out of range: the model has 4 outputs, 0 to 3", Region(4)),
        (DataError, r"the mask selects no pixel in image 0 of the batch", Region(1, torch.zeros(16, 24))),
        (
            UsageError,
            r"the mask must be \(h, w\) or \(2, h, w\) for this batch, got \(3, 4, 4\)",
            Region(1, torch.ones(3, 4, 4)),
        ),
    ],
)
def test_a_region_without_pixels_or_of_another_shape_is_an_error(error, message, target, segmenter):
    model, images = segmenter
    refuses(error, message, GradCAM("conv"), model, images, target=target)


def test_a_class_that_no_pixel_has_is_an_error():
    scores = torch.zeros(2, 3, 4, 4)
    scores[:, 0] = 1
    scores[0, 2, 0, 0] = 2
    refuses(DataError, "no pixel has class 2 in image 1 of the batch, so the region is empty", Region(2), scores)


def test_a_region_of_a_classifier_is_an_error():
    message = r"a region needs the \(B, K, H, W\) scores of a segmentation, and the output of \(1, 7\) holds none"
    refuses(UsageError, message, GradCAM(), models.resnet(), models.pictures(batch=1), target=Region(1))


def test_the_similarity_to_an_image_is_highest_for_the_image_itself():
    encoder = models.randomised(timm.create_model("resnet10t", num_classes=0, channels=(8, 16, 32, 32)))
    images = models.pictures(batch=3)
    target = Similarity.to_image(encoder, images[1])
    with torch.no_grad():
        features = encoder(images)
    close(target(features), F.normalize(features, dim=1) @ F.normalize(features[1], dim=0))
    assert int(target(features).argmax()) == 1
    assert GradCAM()(encoder, images[:1], target=target).raw.sum() > 0


@pytest.mark.parametrize("make", [clip, siglip])
def test_the_similarity_to_a_text_is_the_models_own(make):
    model, images, tokens = make(), models.pictures(64, batch=2), torch.tensor([[3, 7, 49]])
    with torch.no_grad():
        text = model.get_text_features(input_ids=tokens)
        own = model(input_ids=tokens, pixel_values=images)
        target = Similarity(text)
        found = target(ImageEncoder(model)(images))
    close(found, (F.normalize(own.image_embeds, dim=1) @ F.normalize(own.text_embeds, dim=1).T)[:, 0])
    for method in (LeGrad() if make is clip else Chefer(), GradCAM()):
        maps = method(ImageEncoder(model), images, target=target)
        assert maps.raw.shape == (2, 4, 4)
        assert maps.raw.abs().sum() > 0


def test_an_open_clip_model_is_wrapped_by_its_encode_image():
    class OpenCLIP(nn.Module):
        def __init__(self):
            super().__init__()
            self.visual = models.resnet()

        def encode_image(self, image, normalize=False):
            return self.visual(image)

    model, images = OpenCLIP().eval(), models.pictures(batch=1)
    close(ImageEncoder(model)(images), model.visual(images))


def test_a_model_without_a_text_encoder_is_an_error():
    message = "this ResNet has no image encoder that belongs to a text encoder: neither get_image_features nor encode"
    refuses(UsageError, message, ImageEncoder, models.resnet())


def test_references_of_another_shape_are_errors():
    refuses(UsageError, r"a reference is one embedding \(D,\), got \(2, 7\)", Similarity, torch.randn(2, 7))
    message = "the model's embedding has 7 values, and the reference has 8"
    refuses(UsageError, message, GradCAM(), models.resnet(), models.pictures(), target=Similarity(torch.randn(8)))


def test_a_region_of_many_pixels_is_finite_in_half_precision():
    scores = torch.full((1, 2, 200, 200), 10.0, dtype=torch.float16)
    scores[:, 1] = 20
    assert Region(1)(scores).tolist() == [20]


def test_an_embedding_on_a_grid_of_one_cell_is_flat():
    output = types.SimpleNamespace(pooler_output=torch.rand(2, 5, 1, 1))
    assert embedding_of(output).shape == (2, 5)
