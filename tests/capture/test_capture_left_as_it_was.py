"""A capture leaves outputs, gradients, dropout and all state of the model unchanged."""

import pytest
import torch

from tests.capture import models
from tests.capture.models import FAMILIES, BrokenError
from visionattn.capture import ClassRow, FullAttention, HeadMean, NoWeights, PatchRow, capture

close = torch.testing.assert_close


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keep", [ClassRow(), FullAttention(), NoWeights(), PatchRow(0, 0)], ids=lambda k: type(k).__name__
)
def test_outputs_are_equal_bit_for_bit_during_capture(family, keep):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    with torch.no_grad():
        expected = model(images)
        with capture(model, keep):
            found = model(images)
    if family == "torchvision vit":  # torch's fast path, which rounds differently, is off during a capture
        close(found, expected, atol=1e-5, rtol=0)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_agree_to_rounding_when_the_head_mean_replaces_the_fused_call(family):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    with torch.no_grad():
        expected = model(images)
        with capture(model, HeadMean()):
            found = model(images)
    close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep", [FullAttention(), HeadMean()], ids=["full", "head_mean"])
def test_gradients_are_equal_during_capture(family, keep):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    model(images).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with capture(model, keep):
        model(images).square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            close(parameter.grad, expected[name], atol=1e-6, rtol=1e-5)


def test_dropout_draws_the_same_numbers_during_capture():
    model, images = models.vit(drop_rate=0.3, attn_drop_rate=0.3, drop_path_rate=0.3).train(), models.pictures()
    torch.manual_seed(5)
    expected = model(images)
    torch.manual_seed(5)
    with capture(model, HeadMean()) as records:
        assert torch.equal(model(images), expected)
    close(records[0].weights.sum(-1), torch.ones(2, 1, 17))  # the records hold the weights before dropout
    assert model.training


@pytest.mark.parametrize("error", ["no error", "in the model", "in the body", "in the survey"])
@pytest.mark.parametrize("family", ["vit", "torchvision vit"])
def test_capture_restores_all_state(family, error):
    make, size = FAMILIES[family]
    model, images = make(), models.pictures(size)
    model.train()
    blocks = model.blocks if family == "vit" else model.encoder.layers
    next(blocks.children()).eval()  # flags that differ from module to module
    next(model.parameters()).requires_grad_(False)
    for parameter in list(model.parameters())[5:9]:
        parameter.grad = torch.ones_like(parameter)

    def breaks(module, args):
        if error == "in the survey" or len(args[0]) == 2:  # a survey runs one image, the call of the model two
            raise BrokenError

    handle = list(blocks.children())[1].register_forward_pre_hook(breaks) if error.startswith("in the ") else None
    if error == "in the body":
        handle.remove()
    before = models.state_of(model)
    if error == "no error":
        with torch.no_grad(), capture(model):
            model(images)
    else:
        with pytest.raises(BrokenError), torch.no_grad(), capture(model):  # noqa: PT012 - the body is what is tested
            model(images)
            raise BrokenError
    models.assert_same_state(before, models.state_of(model))
    assert not torch.is_inference_mode_enabled()
    if error not in ("no error", "in the body"):
        handle.remove()
    with torch.no_grad(), capture(model) as records:  # a second capture works too
        model(images)
    assert len(records) == (3 if family == "vit" else 2)
