"""The last blocks of a model are found, and run again by themselves with the same result."""

import pytest
import timm
import torch
import torchvision

from tests.capture import models
from visionattn.capture import survey_images
from visionattn.maps.methods.blocks import NeedsAllTokens, Trace, close, last_blocks, read_out, run_again


def blocks_of(model, images):
    with torch.no_grad():
        return last_blocks(survey_images(model, images))


@pytest.mark.parametrize(
    ("make", "size", "names"),
    [
        (models.vit, 64, ["blocks.0", "blocks.1", "blocks.2"]),
        (lambda: models.vit(depth=1), 64, ["blocks"]),
        (models.torchvision_vit, 64, ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]),
        (models.swin, 32, ["layers.1.blocks.0", "layers.1.blocks.1"]),
        (lambda: torchvision.models.swin_t(), 64, ["features.7.0", "features.7.1"]),
        (lambda: timm.create_model("cait_xxs24_224", img_size=64, depth=1), 64, []),  # class attention comes last
        (lambda: timm.create_model("vit_base_patch16_siglip_224", img_size=64, depth=1), 64, []),  # attention pooling
        (models.resnet, 64, []),
    ],
)
def test_the_last_blocks_are_found(make, size, names):
    model = make().eval()
    assert [block.name for block in blocks_of(model, models.pictures(size))] == names


@pytest.mark.parametrize("alone", [True, False])
def test_a_block_and_the_head_run_again_with_the_same_result(alone):
    model, images = models.vit(reg_tokens=2), models.pictures(64)
    trace = Trace(model, blocks_of(model, images), alone=alone)
    with torch.no_grad():
        output = trace.run(images)
        expected = model.forward_features(images)  # normalised, with all tokens
    torch.testing.assert_close(output, model(images).detach())
    tokens, leaf, _ = run_again(model, trace.ran[-1])
    torch.testing.assert_close(model.norm(tokens).detach(), expected[:, : tokens.shape[1]])
    assert tokens.shape[1] == (1 if alone else 19)
    scores = read_out(model, images, trace.ran, tokens, lambda out: out)
    torch.testing.assert_close(scores.detach(), output)
    (gradient,) = torch.autograd.grad(scores.sum(), leaf)
    assert gradient.abs().sum() > 0
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_class_token_that_cannot_run_alone_is_noticed():
    model, images = models.vit(global_pool="avg"), models.pictures(64)
    trace = Trace(model, blocks_of(model, images), alone=True)
    with torch.no_grad():
        output = trace.run(images)
    tokens, _, _ = run_again(model, trace.ran[-1])
    assert not close(read_out(model, images, trace.ran, tokens, lambda out: out), output)
    rotary = models.randomised(timm.create_model("eva02_tiny_patch14_224", img_size=56, depth=1, num_classes=3))
    with torch.no_grad(), pytest.raises(NeedsAllTokens):
        Trace(rotary, blocks_of(rotary, models.pictures(56)), alone=True).run(models.pictures(56))
