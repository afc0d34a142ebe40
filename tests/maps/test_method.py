"""Properties of all methods: targets, independent images of a batch, and an unchanged model."""

import inspect
import json
import pickle

import pytest
import torch

from tests.capture import models
from tests.maps.quick import quick
from tests.refusals import refuses
from visionattn.attention import Gaussian, Retina
from visionattn.errors import UsageError
from visionattn.maps import METHODS, Heatmaps
from visionattn.models import GlimpseNetwork, MLPEncoder

close = torch.testing.assert_close
WITH_TARGET = [name for name, method in METHODS.items() if method.cost != "a forward pass"]
WITHOUT_TARGET = [name for name in METHODS if name not in WITH_TARGET]


def small_cbam():
    return models.resnet("resnet10t", block_args={"attn_layer": "cbam"})


class NormalisedEncoder(MLPEncoder):
    def __init__(self, *args):
        super().__init__(*args, features=16)
        self.layers.append(torch.nn.LayerNorm(16))


def small_glimpses():
    torch.manual_seed(0)
    network = GlimpseNetwork(
        10, retina=Retina(16), policy=Gaussian, encoder=NormalisedEncoder, num_glimpses=4, hidden_size=16
    )
    with torch.no_grad():
        network.policy.layers[-1].weight.mul_(40)  # large weights, so that the glimpses differ although untrained
    return network.eval()


def method_model_images(name, batch=3):
    """Return a method and a small model that it fits."""
    make = {"gate": small_cbam, "gaze": small_glimpses}.get(name, models.vit)
    return quick(name), make(), models.pictures(batch=batch)


def test_every_method_is_listed_under_its_name_and_has_a_docstring():
    assert all(inspect.getdoc(method) and method.name == name for name, method in METHODS.items())


@pytest.mark.parametrize("name", METHODS)
def test_maps_are_between_0_and_1_and_come_with_the_output(name):
    method, model, images = method_model_images(name)
    maps = method(model, images)
    assert isinstance(maps, Heatmaps)
    assert maps.heatmaps.dtype == maps.raw.dtype == torch.float32
    assert maps.heatmaps.shape == maps.raw.shape
    assert maps.heatmaps.amin((1, 2)).tolist() == [0, 0, 0]
    assert maps.heatmaps.amax((1, 2)).tolist() == [1, 1, 1]
    with torch.no_grad():
        close(maps.output, model(images), atol=1e-5, rtol=1e-5)
    assert not maps.output.requires_grad
    assert maps.method == name


@pytest.mark.parametrize("name", WITH_TARGET)
def test_a_target_may_be_an_index_a_tensor_or_a_function(name):
    method, model, images = method_model_images(name)
    best = model(images).argmax(1)
    by_default = method(model, images)
    assert torch.equal(by_default.target, best)
    close(method(model, images, target=best).raw, by_default.raw)
    # finercam takes no function; the best class of a changed image, or of a layer, may differ from that of the whole
    if name not in ("finercam", "legrad") and "backward pass" in method.cost and "many" not in method.cost:
        close(method(model, images, target=lambda out: out.amax(1)).raw, by_default.raw)
    for_class_2 = method(model, images, target=2)
    assert for_class_2.target.tolist() == [2, 2, 2]
    close(method(model, images, target=torch.tensor(2)).raw, for_class_2.raw)
    close(method(model, images, target=torch.tensor([2])).raw, for_class_2.raw)
    if name in ("finercam", "rise"):  # rise weights by the probability of a class, but by the value of a function
        return
    by_function = method(model, images, target=lambda out: out[:, 2])
    close(by_function.raw, for_class_2.raw)
    assert by_function.target is None
    per_image = method(model, images, target=torch.tensor([2, 0, 6], dtype=torch.int32))
    close(per_image.raw[0], for_class_2.raw[0])
    for number, index in ((1, 0), (2, 6)):
        close(
            per_image.raw[number], method(model, images[number : number + 1], target=index).raw[0], atol=1e-5, rtol=1e-3
        )
    assert not torch.allclose(method(model, images, target=3).heatmaps, for_class_2.heatmaps, atol=1e-3)


@pytest.mark.parametrize("name", WITHOUT_TARGET)
def test_methods_that_explain_no_class_ignore_the_target(name):
    method, model, images = method_model_images(name)
    maps = method(model, images, target=2)
    assert torch.equal(maps.raw, method(model, images).raw)
    assert maps.target is None


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (7, r"target \[7, 7, 7\] is out of range: the model has 7 outputs, 0 to 6"),
        (-1, "out of range"),
        (torch.tensor([0, 1, 9]), r"target \[0, 1, 9\] is out of range"),
        (torch.tensor([0, 1]), "target holds 2 indices for 3 images"),
        (torch.zeros(3), "target must be int64 or another integer type, got torch.float32"),
        ("cat", "target must be an index"),
        (lambda out: out, r"a target function must return \(B,\) scores"),
        (lambda out: 1.0, r"a target function must return \(B,\) scores, got 1.0"),
    ],
)
@pytest.mark.parametrize("name", ["gradcam", "chefer", "scorecam"])
def test_a_wrong_target_is_a_clear_error(name, target, message):
    method, model, images = method_model_images(name)
    refuses(UsageError, message, method, model, images, target=target)


@pytest.mark.parametrize(
    "wrap",
    [lambda out: {"features": out[:, :, None], "logits": out}, lambda out: (out[:, 0], out)],
    ids=["dict", "tuple"],
)
def test_scores_are_found_in_every_kind_of_model_output(wrap):
    class Wrapped(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = models.vit()

        def forward(self, images):
            return wrap(self.net(images))

    images = models.pictures()
    maps = METHODS["gradcam"]()(Wrapped(), images, target=1)
    close(maps.raw, METHODS["gradcam"]()(models.vit(), images, target=1).raw)
    assert type(maps.output) is type(wrap(torch.zeros(2, 7)))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.filterwarnings("ignore:.*heatmaps are approximate")
def test_the_map_of_an_image_does_not_depend_on_its_batch(name):
    method, model, images = method_model_images(name)
    together = method(model, images)
    for number in range(3):
        alone = method(model, images[number : number + 1])
        close(together.heatmaps[number], alone.heatmaps[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", ["raw", "rollout", "chefer", "grad_attention", "value_norm", "gradcam"])
@pytest.mark.filterwarnings("ignore:.*heatmaps are approximate")
def test_windows_of_several_images_are_not_mixed_up(name):
    model, images = models.swin(), models.pictures(32, batch=3)
    for stage in model.layers:
        for block in stage.blocks:
            block.attn.fused_attn = name == "value_norm"
    together = METHODS[name]()(model, images).heatmaps
    for number in (2, 0):
        alone = METHODS[name]()(model, images[number : number + 1]).heatmaps
        close(together[number], alone[0], atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", METHODS)
def test_maps_differ_between_images(name):
    """The two tests above would also pass for a map that ignores the images."""
    method, model, images = method_model_images(name)
    assert not torch.allclose(method(model, images).heatmaps, method(model, images.flip(0, 3)).heatmaps, atol=1e-3)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("raises", [False, True], ids=["no error", "error in the model"])
def test_the_model_is_unchanged_afterwards(name, raises):
    method, model, images = method_model_images(name)
    model.train()
    norms = [m for m in model.modules() if isinstance(m, (torch.nn.BatchNorm2d, torch.nn.LayerNorm))]
    norms[0].eval()
    parameters = list(model.parameters())
    parameters[0].requires_grad_(False)
    parameters[3].grad = torch.ones_like(parameters[3])
    before = models.state_of(model)
    if not raises:
        maps = method(model, images)
        assert maps.raw.isfinite().all()
    else:
        calls = []

        def breaks(module, args):
            calls.append(args)
            if len(args[0]) == 3:  # the whole batch; a survey runs one image
                raise KeyError("on purpose")

        handle = norms[-1].register_forward_pre_hook(breaks)
        refuses(KeyError, "on purpose", method, model, images)
        handle.remove()
        assert calls
    models.assert_same_state(before, models.state_of(model))
    assert not images.requires_grad


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_frozen_models_are_explained_in_every_gradient_mode(name, context):
    method, model, images = method_model_images(name)
    expected = method(model, images)
    model.requires_grad_(False)
    with context():
        found = method(model, images * 1)
    close(found.raw, expected.raw)


@pytest.mark.parametrize("name", METHODS)
def test_a_training_model_is_explained_in_evaluation_mode(name):
    method, model, images = method_model_images(name)
    expected = method(model, images)
    close(method(model.train(), images).raw, expected.raw)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.filterwarnings("ignore:.*show nothing")  # wherever a square hides the image, the score may rise
def test_models_of_other_precision_are_explained(name, dtype):
    method, model, images = method_model_images(name)
    expected = method(model, images, target=1)
    found = method(model.to(dtype), images.to(dtype), target=1)
    assert found.raw.dtype == torch.float32
    if dtype is torch.float64:
        close(found.heatmaps, expected.heatmaps, atol=1e-3, rtol=0)
    else:
        pair = torch.stack([found.heatmaps.flatten(), expected.heatmaps.flatten()])
        assert float(torch.corrcoef(pair)[0, 1]) > 0.8


@pytest.mark.parametrize("name", ["raw", "chefer", "gradcam", "scorecam"])
def test_compiled_models_are_explained(name):
    method, model, images = method_model_images(name)
    expected = method(model, images)
    compiled = torch.compile(model, backend="eager")
    close(method(compiled, images).raw, expected.raw)


def test_heatmaps_print_their_peaks_and_are_pickled_at_their_own_size():
    model = models.resnet()
    maps = METHODS["gradcam"]()(model, models.pictures(batch=3), target=2)
    first, *lines = str(maps).splitlines()
    assert first == f"Heatmaps(gradcam of {maps.source}, heatmaps {tuple(maps.heatmaps.shape)})"
    for number, line in enumerate(lines):
        row, column = divmod(int(maps.raw[number].argmax()), maps.raw.shape[2])
        assert line.startswith(f"  image {number}: output 2, peak at row {row}, column {column}; raw values ")
    assert len(lines) == 3
    assert maps._repr_png_().startswith(b"\x89PNG")
    plain_data = json.loads(json.dumps(maps.to_dict()))
    assert plain_data["target"] == [2, 2, 2]
    assert plain_data["heatmaps"] == maps.heatmaps.tolist()
    whole = torch.rand(500, 4, 4)
    part = Heatmaps(whole[:1], whole[:1], {"logits": whole[:1]}, None, "nothing", "fixed")
    data = pickle.dumps(part)
    assert len(data) < whole.nbytes / 4
    assert torch.equal(pickle.loads(data).output["logits"], part.output["logits"])
