"""If a model computes its own softmax, the recorded weights are the weights that the model uses."""

import pytest
import torch
from torch import nn

from tests.capture import models
from visionattn.capture import FullAttention, PatchRow, capture

close = torch.testing.assert_close


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_recorded_weights_equal_the_attentions_that_transformers_returns(implementation):
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=96, image_size=64
    )
    config._attn_implementation = implementation
    model = models.randomised(transformers.ViTForImageClassification(config))
    images = models.pictures()
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(images)
    model.config._attn_implementation = "eager"
    with torch.no_grad():
        expected = model(images, output_attentions=True).attentions
    assert len(records) == len(expected) == 2
    for record, weights in zip(records, expected, strict=True):
        close(record.weights[:, 0], weights, atol=1e-5, rtol=0)
        assert (record.grid, record.num_prefix_tokens) == ((4, 4), 1)


def test_recorded_weights_equal_those_of_an_unfused_timm_vit():
    model, images = models.vit(), models.pictures()
    for block in model.blocks:
        block.attn.fused_attn = False
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(images)
    with torch.no_grad():
        expected, _ = models.unfused(model, images)
    for record, weights in zip(records, expected, strict=True):
        assert torch.equal(record.weights[:, 0], weights)


def test_kept_weights_are_a_copy_of_the_selected_rows_only():
    class HalvedInPlace(nn.Module):
        """Change the weights in place after the softmax."""

        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 8, 16, 16)

        def forward(self, x):
            tokens = self.embed(x).flatten(2).transpose(1, 2)
            weights = torch.softmax(tokens @ tokens.mT, -1)
            weights.mul_(0.5)
            return weights @ tokens

    model, images = HalvedInPlace().eval(), models.pictures()
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(images)
    torch.testing.assert_close(records[0].weights.sum(-1), torch.ones(2, 1, 1, 16))
    with torch.no_grad(), capture(model, PatchRow(1, 2)) as records:
        model(images)
    assert records[0].weights.untyped_storage().nbytes() == records[0].weights.numel() * 4
