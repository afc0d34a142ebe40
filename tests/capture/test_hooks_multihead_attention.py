"""`nn.MultiheadAttention`, whose softmax or fused call is hidden inside one function, is recorded too."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.capture import models
from tests.capture.models import softmax_by_hand
from visionattn.capture import FullAttention, capture

close = torch.testing.assert_close


def weights_from_projections(model, images):
    """Compute the weights of every nn.MultiheadAttention of a torchvision ViT from the input and the projections."""
    weights = []

    def append_weights(module, args):
        x, heads = args[0], module.num_heads
        query, key, _ = F.linear(x, module.in_proj_weight, module.in_proj_bias).chunk(3, -1)
        query, key = (part.unflatten(2, (heads, -1)).transpose(1, 2) for part in (query, key))
        weights.append(softmax_by_hand(query, key))

    handles = [layer.self_attention.register_forward_pre_hook(append_weights) for layer in model.encoder.layers]
    with torch.no_grad():
        model(images)
    for handle in handles:
        handle.remove()
    return weights


@pytest.mark.parametrize("mode", ["fast path", "with gradients", "training"])
def test_weights_inside_multihead_attention_are_recorded(mode):
    model, images = models.torchvision_vit().train(mode == "training"), models.pictures()
    expected = weights_from_projections(model, images)
    with torch.set_grad_enabled(mode != "fast path"), capture(model, FullAttention()) as records:
        model(images)
    assert [record.name for record in records] == [f"encoder.layers.encoder_layer_{i}.self_attention" for i in range(2)]
    for record, weights in zip(records, expected, strict=True):
        close(record.weights[:, 0].double(), weights, atol=1e-5, rtol=0)
        assert (record.grid, record.num_prefix_tokens) == ((4, 4), 1)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_recorded_weights_equal_those_that_multihead_attention_returns(batch_first, need_weights):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(3, 16, 8, 8)
            self.attention = nn.MultiheadAttention(16, 2, batch_first=batch_first)

        def forward(self, images, need_weights=need_weights):
            x = self.embed(images).flatten(2).transpose(1, 2)
            x = x if batch_first else x.transpose(0, 1)
            out, weights = self.attention(x, x, x, need_weights=need_weights, average_attn_weights=False)
            return weights if need_weights else out

    torch.manual_seed(0)
    model, images = Net().eval(), models.pictures(32)
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(images)
    with torch.no_grad():
        expected = model(images, need_weights=True)
    close(records["attention"].weights[:, 0], expected, atol=1e-6, rtol=0)


class OneLayer(nn.Module):
    """A patch embedding and one encoder layer, which torch runs as one kernel in evaluation mode."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 16, 8, 8)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)

    def forward(self, images):
        return self.layer(self.embed(images).flatten(2).transpose(1, 2)).mean(1)


def test_an_encoder_layer_with_its_nested_fast_path_is_recorded():
    torch.manual_seed(0)
    model = OneLayer().eval()
    with torch.no_grad(), capture(model, FullAttention()) as records:
        model(models.pictures(32))
    assert [record.name for record in records] == ["layer.self_attn"]
    close(records[0].weights.sum(-1), torch.ones(2, 1, 2, 16))


@pytest.mark.parametrize("mode", ["eval", "train", "eval with gradients"])
def test_an_encoder_layer_changes_by_rounding_only_where_torch_would_run_one_kernel(mode):
    torch.manual_seed(0)
    model, images = OneLayer().train(mode == "train"), models.pictures(32)
    model.layer.dropout.p = model.layer.dropout1.p = model.layer.dropout2.p = model.layer.self_attn.dropout = 0.0
    with torch.set_grad_enabled(mode == "eval with gradients"):
        plain = model(images)
        with capture(model):
            captured = model(images)
        after = model(images)
    assert torch.equal(after, plain)
    if mode == "eval":
        close(captured, plain, atol=1e-5, rtol=0)
    else:
        assert torch.equal(captured, plain)
