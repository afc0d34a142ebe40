"""The next survey notices a change of the model: the heatmap equals the heatmap of a model built with the change."""

import copy
import functools
import types

import pytest
import timm
import torch
from torch import nn

from tests.capture import models
from visionattn.attention import CBAM, TokenMerging, Windowed, insert, reduce_tokens, swap_attention
from visionattn.capture import survey as survey_module
from visionattn.capture import survey_images
from visionattn.maps import Chefer, EigenCAM, GradCAM, GradientRollout, RawAttention, Rollout

pytestmark = pytest.mark.filterwarnings("ignore::visionattn.errors.MapWarning")
IMAGES = models.pictures(64, 4)


def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=64).eval()


def shift_patches(self, x):
    """A forward pass of a block that moves every patch token one cell to the right."""
    grid = x[:, 1:].unflatten(1, (4, 4)).roll(1, 2).flatten(1, 2)
    return type(self).forward(self, torch.cat([x[:, :1], grid], 1))


def replace_forward(model):
    block = model.blocks[0]
    block.forward = types.MethodType(shift_patches, block)


def replace_module(model):
    class Roll(nn.Module):
        def forward(self, x):
            return torch.cat([x[:, :1], x[:, 1:].roll(5, 1)], 1)

    model.blocks[1] = nn.Sequential(Roll(), model.blocks[1])


def hook_forward(model):
    model.blocks[0].register_forward_hook(lambda module, args, out: torch.cat([out[:, :1], out[:, 1:].roll(3, 1)], 1))


CHANGES = {
    "reduction": lambda model: reduce_tokens(model, TokenMerging(4)),
    "windows": lambda model: swap_attention(model, functools.partial(Windowed, window=2)),
    "gates": lambda model: insert(model, CBAM, at="blocks"),
    "forward": replace_forward,
    "module": replace_module,
    "hook": hook_forward,
}


@pytest.mark.parametrize("method", [Rollout, Chefer, GradientRollout, RawAttention, GradCAM, EigenCAM])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_has_the_heatmap_of_a_model_built_with_the_change(change, method):
    model, built = vit(), vit()
    torch.manual_seed(1)
    CHANGES[change](built)
    expected = method()(built, IMAGES)
    method()(model, IMAGES)  # surveys the model before the change
    torch.manual_seed(1)
    CHANGES[change](model)
    found = method()(model, IMAGES)
    torch.testing.assert_close(found.raw, expected.raw)
    assert found.source == expected.source


@pytest.mark.parametrize("method", [Rollout, Chefer, RawAttention, GradCAM])
def test_a_changed_attribute_gives_the_heatmap_of_a_model_built_with_it(method):
    model = vit()
    swap_attention(model, functools.partial(Windowed, window=2))
    built = vit()
    swap_attention(built, functools.partial(Windowed, window=4))
    method()(model, IMAGES)
    for module, wanted in zip(model.modules(), built.modules(), strict=True):
        if isinstance(module, Windowed):
            for name, value in vars(wanted).items():
                if not isinstance(value, (nn.Module, dict)) and not name.startswith("_"):
                    setattr(module, name, value)
    torch.testing.assert_close(method()(model, IMAGES).raw, method()(built, IMAGES).raw)


class Sometimes(nn.Module):
    """A ViT that skips a block by a switch outside of the model, which the cache of surveys cannot notice."""

    def __init__(self, skip):
        super().__init__()
        self.vit, self.skip = vit(), functools.partial(skip.__getitem__, 0)

    def forward(self, x):
        x = self.vit.pos_drop(self.vit._pos_embed(self.vit.patch_embed(x)))
        for number, block in enumerate(self.vit.blocks):
            if not (self.skip() and number == 2):
                x = block(x)
        return self.vit.forward_head(self.vit.norm(x))


@pytest.mark.parametrize("method", [Rollout, Chefer, RawAttention])
def test_a_change_outside_of_the_model_is_found_when_the_model_runs(method):
    switch = [False]
    model = Sometimes(switch).eval()
    plain = method()(model, IMAGES)
    switch[0] = True
    found = method()(model, IMAGES)
    torch.testing.assert_close(found.raw, method()(copy.deepcopy(model), IMAGES).raw)
    assert not torch.equal(found.raw, plain.raw) or method is RawAttention
    switch[0] = False
    torch.testing.assert_close(method()(model, IMAGES).raw, plain.raw)


def test_the_survey_of_an_unchanged_model_is_cached():
    model = vit()
    assert survey_images(model, IMAGES) is survey_images(model, IMAGES)
    insertion = insert(model, CBAM, at="blocks")
    assert len(survey_images(model, IMAGES).gates) > 0
    insertion.remove()
    assert survey_images(model, IMAGES).gates == {}


@pytest.mark.parametrize("method", [Rollout, Chefer, RawAttention, GradCAM, EigenCAM])
def test_a_second_heatmap_needs_no_survey(method, monkeypatch):
    model, runs, plain = vit(), [], survey_module._run_survey
    monkeypatch.setattr(survey_module, "_run_survey", lambda *args: runs.append(1) or plain(*args))
    for _ in range(3):
        method()(model, IMAGES)
    assert len(runs) == 1


def test_a_model_with_nested_settings_is_surveyed_once(monkeypatch):
    """The configuration of a model of transformers holds a torch.dtype, and objects in objects."""
    surveys = []
    run_survey = survey_module._run_survey
    monkeypatch.setattr(survey_module, "_run_survey", lambda *arguments: surveys.append(1) or run_survey(*arguments))
    model = vit()
    inner = types.SimpleNamespace(dtype=torch.float32, deeper=types.SimpleNamespace(value=types.SimpleNamespace(x=1)))
    model.config = types.SimpleNamespace(dtype=torch.float32, inner=inner)
    for _ in range(3):
        survey_images(model, IMAGES)
    assert len(surveys) == 1
    model.config.inner = None
    survey_images(model, IMAGES)
    assert len(surveys) == 2
