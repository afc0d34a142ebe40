"""High-norm tokens are found at their positions, and nowhere else."""

import json
import pickle
import warnings

import pytest
import torch

from tests.capture import models
from tests.refusals import refuses
from visionattn.errors import DataError, MapWarning, UsageError
from visionattn.maps import DinoHeads, RawAttention, Rollout, find_artefacts
from visionattn.maps.artefacts import Artefacts, outliers

close = torch.testing.assert_close


def with_long_tokens(model, places, length=40.0):
    """Make the last block but one write tokens of a large norm at some patches of the first image."""

    def write(module, args, out):
        out = out.clone()
        first = model.num_prefix_tokens
        for row, column in places if len(out) > 1 else ():
            token = out[0, first + row * model.patch_embed.grid_size[1] + column]
            token *= length / token.norm() * out.norm(dim=-1).median()
        return out

    model.blocks[-2].register_forward_hook(write)
    return model


MODELS = {
    "vit": lambda: models.vit(img_size=128),
    "registers": lambda: models.vit(img_size=128, reg_tokens=4),
    "no class token": lambda: models.vit(img_size=128, class_token=False, global_pool="avg"),
}


@pytest.mark.parametrize("name", MODELS)
def test_high_norm_tokens_are_found_at_their_positions(name):
    model, places = with_long_tokens(MODELS[name](), [(0, 3), (5, 7)]), [[0, 0, 3], [0, 5, 7]]
    found = find_artefacts(model, models.pictures(128))
    assert found.mask.nonzero().tolist() == places
    assert found.source == "blocks.2"
    assert found.report().startswith("2 high-norm tokens after blocks.2 in 1 of 2 images, ")


@pytest.mark.parametrize("name", MODELS)
def test_norms_are_those_of_patch_tokens_after_the_last_block(name):
    model, images, outputs = MODELS[name](), models.pictures(128), []
    handle = model.blocks[2].register_forward_hook(lambda module, args, out: outputs.append(out.detach()))
    model(images)
    handle.remove()
    found = find_artefacts(model, images)
    expected = torch.zeros(2, 8, 8)
    for b in range(2):
        for i in range(8):
            for j in range(8):
                token = outputs[0][b, model.num_prefix_tokens + 8 * i + j]
                expected[b, i, j] = sum(float(x) ** 2 for x in token) ** 0.5
    close(found.norms, expected)
    assert not found.mask.any()
    assert found.report() == "no high-norm tokens after blocks.2"


def test_the_layer_may_be_chosen_by_name():
    model = with_long_tokens(models.vit(img_size=128), [(2, 2)])
    images = models.pictures(128)
    assert find_artefacts(model, images, layer="blocks.1").mask.nonzero().tolist() == [[0, 2, 2]]
    assert not find_artefacts(model, images, layer="blocks.0").mask.any()
    with pytest.raises(
        UsageError, match=r"this VisionTransformer has no module 'blocks\.7' whose output lies on a grid"
    ):
        find_artefacts(model, images, layer="blocks.7")


def test_high_norm_tokens_of_torchvision_models_are_found():
    found = find_artefacts(models.torchvision_vit(), models.pictures())
    assert (found.source, found.norms.shape) == ("encoder.layers.encoder_layer_1", (2, 4, 4))


@pytest.mark.parametrize("make", [models.resnet, models.swin], ids=["resnet", "swin"])
def test_find_artefacts_needs_attention_on_one_grid(make):
    model = make()
    if "Swin" in type(model).__name__:
        # no error for smaller images, for which the last window is the whole grid
        assert not find_artefacts(model, models.pictures(32)).mask.any()
    else:
        refuses(UsageError, "on a grid; find_artefacts needs a ViT", lambda: find_artefacts(model, models.pictures()))


@pytest.mark.parametrize("method", [RawAttention(), DinoHeads(), Rollout()], ids=lambda method: method.name)
def test_maps_of_attention_warn_of_artefacts(method):
    model, images = models.vit(img_size=128), models.pictures(128)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(model, images)
    before = models.state_of(with_long_tokens(model, [(0, 3), (5, 7)]))
    with pytest.warns(MapWarning, match="2 high-norm tokens after blocks.2 in 1 of 2 images"):
        method(model, images)
    models.assert_same_state(before, models.state_of(model))


def test_the_model_is_unchanged_afterwards():
    model = models.vit(img_size=128).train()
    before = models.state_of(model)
    find_artefacts(model, models.pictures(128))
    with torch.inference_mode():
        find_artefacts(model, models.pictures(128))
    models.assert_same_state(before, models.state_of(model))
    refuses(DataError, "empty", lambda: find_artefacts(model, models.pictures(128, batch=0)))


@pytest.mark.parametrize(("high", "expected"), [(0, 0), (1, 1), (6, 6), (7, 0), (30, 0)])
def test_high_norms_of_more_than_a_tenth_of_the_tokens_are_no_artefacts(high, expected):
    norms = torch.rand(2, 64, generator=torch.Generator().manual_seed(0)) + 1
    norms[1, :high] *= 10
    found = outliers(norms.reshape(2, 8, 8)).flatten(1)
    assert not found[0].any()
    assert int(found[1].sum()) == expected
    assert found[1, :expected].all()


def test_grids_of_few_tokens_have_no_artefacts():
    norms = torch.ones(1, 7, 7)
    norms[0, 0, 0] = 100
    assert not outliers(norms).any()


def test_artefacts_print_their_report_and_are_pickled_at_their_own_size():
    whole = torch.rand(200, 8, 8)
    found = Artefacts(whole[:2], whole[:2] > 0.99, "blocks.2")
    assert str(found) == found.report()
    assert found._repr_png_().startswith(b"\x89PNG")
    plain_data = json.loads(json.dumps(found.to_dict()))
    assert plain_data["mask"] == found.mask.tolist()
    data = pickle.dumps(found)
    assert len(data) < whole.nbytes / 4
    assert torch.equal(pickle.loads(data).norms, found.norms)
