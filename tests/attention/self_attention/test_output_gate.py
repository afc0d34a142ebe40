"""The output gate is 1 at first, and multiplies the heads of a ViT by the paper's gates."""

import pytest
import torch

from tests.capture import models
from tests.refusals import refuses
from visionattn.attention import Dense, OutputGate, swap_attention
from visionattn.capture import capture
from visionattn.errors import UsageError
from visionattn.models import Classifier

close = torch.testing.assert_close
both = pytest.mark.parametrize("per", ["head", "channel"])
VITS = {
    "vit_tiny_patch16_224": {},
    "eva02_tiny_patch14_224": {"img_size": 56},
    "vit_small_patch16_dinov3": {},
}


def filled(model):
    """Give every gate random weights."""
    torch.manual_seed(0)
    for gate in (part for part in model.modules() if isinstance(part, OutputGate)):
        torch.nn.init.normal_(gate.linear.weight)
        torch.nn.init.normal_(gate.linear.bias)


@both
@pytest.mark.parametrize("name", VITS)
def test_a_new_gate_changes_no_output_and_learns(name, per):
    model, images = models.vit(name=name, **VITS[name]), models.pictures(VITS[name].get("img_size", 64))
    for parameter, value in model.named_parameters():
        if "gamma" in parameter:  # DINOv3 scales its attention by 1e-5
            value.data.fill_(1)
    expected = model(images)
    swap = swap_attention(model, Dense, gate=per)
    close(model(images), expected, atol=1e-5, rtol=1e-4)
    model(images).square().sum().backward()
    gates = [part.output_gate for part in swap.places.values()]
    assert all(gate.linear.weight.grad.abs().sum() > 0 for gate in gates)
    filled(model)
    assert not torch.allclose(model(images), expected, atol=1e-3)
    swap.remove()
    close(model(images), expected)


@both
def test_heads_are_multiplied_by_gates_of_the_attentions_input(per):
    model, images = models.vit(depth=1), models.pictures()
    swap_attention(model, Dense, gate=per)
    filled(model)
    attention, calls = model.blocks[0].attn, []
    attention.register_forward_hook(lambda module, args, out: calls.append((args[0], out)))
    model(images)
    ((x, out),) = calls
    batch, tokens, channels = x.shape
    q, k, v = attention.qkv(x).reshape(batch, tokens, 3, 3, 16).permute(2, 0, 3, 1, 4)
    heads = (q @ k.mT / 4).softmax(-1) @ v
    linear = attention.output_gate.linear
    for b in range(batch):
        for n in range(tokens):
            gate = 2 / (1 + (-(linear.weight @ x[b, n] + linear.bias)).exp())
            for head in range(3):
                heads[b, head, n] *= gate[16 * head : 16 * head + 16] if per == "channel" else gate[head]
    close(out, attention.proj(heads.transpose(1, 2).reshape(batch, tokens, channels)), atol=1e-5, rtol=1e-4)


def test_recorded_weights_do_not_depend_on_the_gate():
    model, images = models.vit(depth=1), models.pictures()
    with capture(model) as before:
        model(images)
    swap_attention(model, Dense, gate="head")
    filled(model)
    with capture(model) as after:
        model(images)
    for record, other in zip(before, after, strict=True):
        close(record.weights, other.weights, atol=1e-5, rtol=1e-4)


def test_weights_load_with_and_without_gates():
    original, model = models.vit(), models.vit()
    swap_attention(model, Dense, gate="channel")
    new = {f"blocks.{block}.attn.output_gate.linear.{part}" for block in range(3) for part in ("weight", "bias")}
    assert model.state_dict().keys() == original.state_dict().keys() | new
    model.load_state_dict(original.state_dict())
    filled(model)
    second = models.vit()
    swap_attention(second, Dense, gate="channel")
    second.load_state_dict(model.state_dict())
    close(second(models.pictures()), model(models.pictures()))


def test_a_classifier_takes_the_gate_and_wrong_gates_are_errors():
    options = {"img_size": 160, "embed_dim": 48, "num_heads": 3, "depth": 1}
    network = Classifier("test_vit", num_classes=2, options=options, self_attention=[Dense], self_attention_gate="head")
    assert network.backbone.blocks[0].attn.output_gate.linear.out_features == 3
    refuses(
        UsageError, "needs self_attention", lambda: Classifier("test_vit", num_classes=2, self_attention_gate="head")
    )
    refuses(ValueError, "must be head or channel, got 'row'", swap_attention, models.vit(), Dense, gate="row")
