"""The neurons that make high-norm tokens are found, and heatmaps are right again with a register."""

import copy
import warnings

import pytest
import torch

from tests.capture import models
from tests.maps.planted_registers import attract, plant
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.maps import METHODS, add_registers, find_artefacts

NEURONS = (7, 40)


@pytest.fixture(scope="module")
def images():
    return models.pictures(128, batch=4)


@pytest.fixture(scope="module")
def clean():
    return models.vit(img_size=128, depth=4)


@pytest.fixture(scope="module")
def planted(clean, images):
    return attract(plant(copy.deepcopy(clean), images, NEURONS), images)


def test_exactly_the_planted_neurons_are_found_and_no_high_norm_is_left(planted, images):
    with add_registers(planted, images) as registers:
        assert {name: set(indices) for name, indices in registers.token.neurons.items()} == {
            "blocks.1.mlp.fc2": set(NEURONS)
        }
        assert registers.before.mask.float().mean() > 0.01
        assert not registers.after.mask.any()
        assert not find_artefacts(planted, images).mask.any()
        share = 100 * float(registers.before.mask.float().mean())
        expected = f"a register for 2 neurons: high norms in {share:.1f} % of patches without it, 0.0 % with it"
        assert repr(registers) == expected


@pytest.mark.parametrize("name", ["raw", "value_norm", "token_rank"])
def test_maps_are_again_those_of_the_model_without_planted_neurons(name, clean, planted, images):
    def similarity():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the high-norm tokens
            pair = [METHODS[name]()(model, images, target=1).raw.flatten() for model in (clean, planted)]
        return float(torch.corrcoef(torch.stack(pair))[0, 1])

    before = similarity()
    with add_registers(planted, images):
        after = similarity()
    assert after > before + 0.2
    assert similarity() == before


def test_the_model_is_restored_bit_by_bit(planted, images):
    state, before = models.state_of(planted), planted(images)
    registers = add_registers(planted, images)
    assert not torch.equal(planted(images), before)
    registers.remove()
    registers.remove()
    assert torch.equal(planted(images), before)
    models.assert_same_state(state, models.state_of(planted))


def test_the_number_of_neurons_can_be_given(planted, images):
    with add_registers(planted, images, count=1) as registers:
        assert sum(map(len, registers.token.neurons.values())) == 1


@pytest.mark.parametrize(
    ("error", "message", "make"),
    [
        (UsageError, "count must be at least 1, got 0", lambda planted, clean, images: (planted, images, 0)),
        (
            DataError,
            "no high-norm tokens after blocks.3, so these images need no register",
            lambda planted, clean, images: (clean, images),
        ),
        (
            UsageError,
            "this ResNet has no ViT to which a register can be added",
            lambda planted, clean, images: (models.resnet(), images),
        ),
        (UsageError, "this SwinTransformer has no ViT", lambda planted, clean, images: (models.swin(), images)),
    ],
)
def test_what_cannot_get_a_register_is_an_error(error, message, make, planted, clean, images):
    model, batch, *count = make(planted, clean, images)
    refuses(error, message, lambda: add_registers(model, batch, count=count[0] if count else None))


def test_norms_that_no_few_neurons_make_are_an_error_and_leave_the_model_unchanged(clean, images):
    model = copy.deepcopy(clean)

    def write(module, args, out):
        out = out.clone()
        out[:, 9] *= 40
        return out

    model.blocks[1].register_forward_hook(write)
    before = model(images)
    refuses(DataError, "moving 50 neurons leaves more than a tenth of the high-norm", add_registers, model, images)
    assert torch.equal(model(images), before)
