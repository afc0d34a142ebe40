"""A register token matches a loop over the blocks, in every kind of ViT, and is removed without a trace."""

import copy
from functools import partial

import pytest
import timm
import torch
import transformers

from tests.capture import models
from tests.refusals import refuses
from visionattn.attention import RegisterToken, TokenMerging, Windowed, reduce_tokens, swap_attention, token_path
from visionattn.errors import UsageError

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def transformers_vit(kind):
    config = getattr(transformers, f"{kind}Config")(**SMALL, image_size=64, patch_size=16)
    return models.randomised(getattr(transformers, f"{kind}ForImageClassification")(config))


VITS = {
    "timm": models.vit,
    "timm, registers": lambda: models.vit(reg_tokens=2),
    "timm, no class token": lambda: models.vit(class_token=False, global_pool="avg"),
    "torchvision": models.torchvision_vit,
    "transformers ViT": lambda: transformers_vit("ViT"),
    "transformers DINOv2": lambda: transformers_vit("Dinov2"),
    "a part of a model": lambda: torch.nn.Sequential(models.vit(), torch.nn.Identity()),
}


def scores(model, images):
    with torch.no_grad():
        output = model(images)
    return getattr(output, "logits", output)


def test_the_register_matches_a_loop_over_the_blocks():
    vit, images, moved = models.vit(), models.pictures(64, batch=2), [3, 50]
    with torch.no_grad():
        tokens = vit._pos_embed(vit.patch_embed(images))
        tokens = torch.cat([tokens, torch.zeros(2, 1, 48)], 1)  # at the end, where it makes no difference
        for number, block in enumerate(vit.blocks):
            tokens = tokens + block.attn(block.norm1(tokens))
            hidden = block.mlp.act(block.mlp.fc1(block.norm2(tokens)))
            if number == 1:
                for image in hidden:
                    for neuron in moved:
                        top = max(float(token[neuron]) for token in image[:-1])
                        image[:, neuron] = 0
                        image[-1, neuron] = top
            tokens = tokens + block.mlp.fc2(hidden)
        expected = vit.head(vit.norm(tokens)[:, 0])
    with RegisterToken(vit, {"blocks.1.mlp.fc2": moved}):
        torch.testing.assert_close(scores(vit, images), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", VITS)
def test_every_kind_of_vit_gets_a_register_and_is_restored_bit_by_bit(name):
    model, images = VITS[name](), models.pictures(64, batch=2)
    before, state = scores(model, images), models.state_of(model)
    path = token_path(model)
    assert len(path.linears) == len(path.blocks) >= 2
    first = next(iter(path.linears))
    token = RegisterToken(model, {first: (0, 5)})
    assert str(token) == f"RegisterToken(2 neurons of {first})"
    found = scores(model, images)
    assert found.isfinite().all()
    assert not torch.equal(found, before)
    torch.testing.assert_close(scores(copy.deepcopy(model), images), found)
    token.remove()
    assert torch.equal(scores(model, images), before)
    models.assert_same_state(state, models.state_of(model))


def test_gradients_flow_through_the_register():
    vit, images = models.vit(), models.pictures(64, batch=1).requires_grad_()
    with RegisterToken(vit, {"blocks.0.mlp.fc2": (3,)}):
        (gradient,) = torch.autograd.grad(vit(images)[0, 1], images)
    assert gradient.abs().sum() > 0


def test_swapped_attention_and_reduced_tokens_are_errors():
    vit = models.vit()
    swap = swap_attention(vit, partial(Windowed, window=2))
    refuses(UsageError, "the attention of this VisionTransformer is swapped", RegisterToken, vit, {})
    swap.remove()
    reduced = reduce_tokens(vit, TokenMerging(2))
    refuses(UsageError, "the tokens of this VisionTransformer are reduced", RegisterToken, vit, {})
    reduced.remove()
    with RegisterToken(vit, {}):
        reduce_tokens(vit, TokenMerging(2))
        refuses(UsageError, "tokens were reduced in a model with a register", vit, models.pictures(64))


@pytest.mark.parametrize(
    ("make", "neurons", "message"),
    [
        (models.resnet, {}, "this ResNet has no ViT to which a register can be added"),
        (models.swin, {}, "this SwinTransformer has no ViT"),
        (lambda: timm.create_model("eva02_tiny_patch14_224", depth=1), {}, "this Eva has no ViT"),
        (
            models.vit,
            {"blocks.1.mlp.fc1": [0]},
            "'blocks.1.mlp.fc1' is not the last linear layer of a block; these are bl",
        ),
        (models.vit, {"blocks.1.mlp.fc2": [192]}, r"blocks.1.mlp.fc2 has the neurons 0 to 191, got \[192\]"),
    ],
)
def test_other_models_layers_and_neurons_are_errors(make, neurons, message):
    model = make()
    refuses(UsageError, message, RegisterToken, model, neurons)


def test_a_second_register_is_an_error():
    model = models.vit()
    (name, *_) = token_path(model).linears
    with RegisterToken(model, {name: [0]}):
        refuses(UsageError, "has a register already", RegisterToken, model, {name: [1]})
    RegisterToken(model, {name: [1]}).remove()
