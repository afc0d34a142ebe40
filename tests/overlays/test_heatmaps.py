"""Heatmaps and overlays of single pictures: positions, forms of input, targets, and errors."""

import io
import json
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn

import visionattn as va
from tests.capture.models import vit
from tests.explorer.explored import photo
from tests.refusals import refuses
from visionattn.cli import main
from visionattn.data import Preprocess, read_image
from visionattn.drawing import blend
from visionattn.errors import DataError, MapWarning, UsageError
from visionattn.maps import LayerCAM, Rollout


class Brightness(nn.Module):
    """Outputs the mean brightness and its negative; the feature map of its only layer is the local brightness."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 8, stride=8, bias=False)
        nn.init.constant_(self.layer.weight, 1 / 192)

    def forward(self, x_BCHW):
        mean_B1 = self.layer(x_BCHW).mean((2, 3))
        return torch.cat([mean_B1, -mean_B1], 1)


UNNORMALISED = Preprocess(64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def square_at(x, y, size=20, height=100, width=200):
    """Return a black picture with a white square whose centre is (x, y)."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y - size // 2 : y + size // 2, x - size // 2 : x + size // 2] = 255
    return picture


@pytest.mark.parametrize(("x", "y"), [(80, 30), (120, 70), (100, 50)])
def test_the_heat_lies_on_the_square_in_pixels_of_the_source(x, y):
    heatmap = va.heatmap(Brightness(), square_at(x, y), method="layercam", target=0, preprocess=UNNORMALISED)
    assert heatmap.values.shape == (100, 200)
    assert heatmap.values.dtype == np.float32
    assert heatmap.values.min() == 0
    assert heatmap.values.max() <= 1
    np.testing.assert_allclose(heatmap.peak, (x, y), atol=12.5)  # a cell is 100 · 8 / 64 = 12.5 pixels wide
    row, column = np.unravel_index(heatmap.values.argmax(), heatmap.values.shape)
    np.testing.assert_allclose((column, row), (x, y), atol=12.5)
    total = heatmap.values.sum()
    centre = [(heatmap.values.sum(axis) * np.arange(size)).sum() / total for axis, size in ((0, 200), (1, 100))]
    np.testing.assert_allclose(centre, (x, y), atol=3)
    assert not heatmap.values[:, :50].any()  # the model's input is the central 100 × 100
    assert not heatmap.values[:, 150:].any()


def test_a_heatmap_has_the_overlay_and_values_that_the_command_line_writes(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    arguments = ["overlay", "--images", str(tmp_path / "photo.png"), "--out", str(tmp_path / "seen"), "--format", "png"]
    assert main([*arguments, "--model", "test_vit", "--weights", "random", "--save", "overlay", "heatmap"]) == 0
    torch.manual_seed(0)
    heatmap = va.heatmap(timm.create_model("test_vit"), tmp_path / "photo.png")
    np.testing.assert_array_equal(heatmap.overlay(), read_image(tmp_path / "seen" / "photo.png.overlay.png"))
    written = np.array(Image.open(tmp_path / "seen" / "photo.png.heatmap.png"))
    np.testing.assert_allclose(heatmap.values, written / 65535, atol=1 / 65535)
    heatmap.save(tmp_path / "again.png")
    np.testing.assert_array_equal(read_image(tmp_path / "again.png"), heatmap.overlay())


def test_files_arrays_and_tensors_of_a_picture_give_the_same_heatmap(tmp_path):
    model, picture = vit(), photo()
    Image.fromarray(picture).save(tmp_path / "photo.png")
    forms = [tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(picture), picture]
    content = (tmp_path / "photo.png").read_bytes()
    batch = va.heatmap(model, [*forms, io.BytesIO(content)], method="rollout")
    single = [va.heatmap(model, form, method=Rollout()) for form in (*forms, io.BytesIO(content))]
    for found in (*batch, *single):
        np.testing.assert_array_equal(found.image, picture)
        np.testing.assert_allclose(found.values, single[0].values, atol=1e-5)
        assert (found.method, found.prediction) == ("rollout", single[0].prediction)
    values, _ = Preprocess(64, crop_fraction=0.9, interpolation="bicubic", mean=(0.5,) * 3, std=(0.5,) * 3)(picture)
    of_tensor = va.heatmap(model, torch.from_numpy(values), method="rollout")
    np.testing.assert_array_equal(of_tensor.explained.raw_hw, single[0].explained.raw_hw)
    assert of_tensor.image.shape == (64, 64, 3)
    tensors = torch.from_numpy(values)[None].expand(2, -1, -1, -1)
    assert len(va.heatmap(model, tensors, preprocess=Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3))) == 2


def test_overlays_follow_the_interpolation_and_values_do_not():
    model, picture = vit(), photo()
    shown = va.heatmap(model, picture, method="rollout")
    explained = shown.explained
    np.testing.assert_array_equal(shown.values, explained.placement.carry(explained.heatmap_hw, "linear"))
    for interpolation in ("nearest", "linear", "smooth"):
        carried = explained.placement.carry(explained.heatmap_hw, interpolation)
        expected = blend(picture, carried, seen_HW=explained.placement.seen())
        np.testing.assert_array_equal(shown.overlay(interpolation=interpolation), expected)
        drawn = va.overlay(model, picture, method="rollout", interpolation=interpolation)
        np.testing.assert_array_equal(np.asarray(drawn), expected)
    np.testing.assert_array_equal(shown.overlay(), expected)  # smooth is the default


def test_a_photograph_is_rotated_by_its_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(photo(60, 100)).save(tmp_path / "turned.png", exif=exif)
    of_file = va.heatmap(vit(), tmp_path / "turned.png")
    with Image.open(tmp_path / "turned.png") as opened:
        of_image = va.heatmap(vit(), opened)
    assert of_file.values.shape == (100, 60)
    np.testing.assert_array_equal(of_file.image, of_image.image)


@pytest.mark.parametrize("training", [True, False])
def test_the_model_is_unchanged_afterwards(training):
    model = vit().train(training)
    va.overlay(model, photo(), method="gradcam", target=2)
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_torchvision_models_and_classifiers_have_their_own_preprocessing():
    resnet = torchvision.models.resnet18()
    shown = va.heatmap(resnet, photo(300, 400), layer="layer3")
    assert shown.explained.placement.input_size == (224, 224)
    np.testing.assert_allclose(shown.explained.placement.matrix[0, 0], 256 / 300, rtol=0.01)  # 300 become 256 pixels
    assert shown.source == "layer3"
    classifier = va.models.Classifier("test_vit", num_classes=3, options={"img_size": 96})
    assert va.heatmap(classifier, photo()).explained.placement.input_size == (96, 96)


def test_a_model_of_unknown_preprocessing_gets_the_default_and_says_so_once():
    model = Brightness()
    message = (
        r"Brightness does not say .* 224 × 224 pixels .* mean \(0.485, .*; if .*, pass preprocess=.*Preprocess\(224"
    )
    with pytest.warns(MapWarning, match=message) as told:
        seen = va.heatmap(model, photo(90, 120), method="layercam", target=0)
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = va.heatmap(model, photo(90, 120), method="layercam", target=0)
        expected = va.heatmap(model, photo(90, 120), method="layercam", target=0, preprocess=Preprocess(224))
    np.testing.assert_array_equal(seen.values, expected.values)
    np.testing.assert_array_equal(again.values, expected.values)


def test_a_checkpoint_has_its_preprocessing_and_class_names(quick_run):
    task = va.load(quick_run / "best.ckpt")
    heatmap = va.heatmap(task, photo(64, 64))
    of_network = va.heatmap(task.network, photo(64, 64), preprocess=task.preprocess, class_names=task.class_names)
    np.testing.assert_array_equal(heatmap.values, of_network.values)
    assert heatmap.class_name == task.class_names[heatmap.prediction] == of_network.class_name
    with torch.no_grad():
        values, _ = task.preprocess(photo(64, 64))
        probabilities = task.network(torch.from_numpy(values)[None]).softmax(1)[0]
    assert heatmap.prediction == probabilities.argmax()
    assert heatmap.probability == pytest.approx(probabilities.max().item(), abs=1e-5)
    of_class = va.heatmap(task, photo(64, 64), method="gradcam", target=task.class_names[3])
    assert of_class.target == 3
    page = va.explore(task, [photo(64, 64)], steps=0)
    assert page.images == 1


def test_a_model_with_an_attribute_network_is_not_taken_for_a_task():
    class Flipped(nn.Module):
        """Runs its network on flipped pictures. Tasks have an attribute `network` too."""

        def __init__(self):
            super().__init__()
            self.network = Brightness()

        def forward(self, x_BCHW):
            return 5 - self.network(x_BCHW.flip(2))

    heatmap = va.heatmap(
        Flipped(), square_at(50, 20, height=100, width=100), method="layercam", target=1, preprocess=UNNORMALISED
    )
    assert heatmap.probability == pytest.approx(1 / (1 + np.exp(-2 * 0.04)), abs=0.005)
    assert heatmap.prediction == 1


def test_each_picture_of_a_batch_has_its_own_target():
    model, pictures = vit(), [photo(seed=0), photo(seed=1)]
    both = va.heatmap(model, pictures, method="gradcam", target=[1, 4])
    assert [found.target for found in both] == [1, 4]
    for found, picture, target in zip(both, pictures, (1, 4), strict=True):
        single = va.heatmap(model, picture, method="gradcam", target=target)
        np.testing.assert_allclose(found.values, single.values, atol=1e-4)


def test_notebooks_display_the_overlay_at_no_more_than_768_pixels():
    heatmap = va.heatmap(vit(), photo(900, 1600))
    with Image.open(io.BytesIO(heatmap._repr_png_())) as shown:
        assert shown.size == (768, 432)
    picture = va.overlay(vit(), photo(900, 1600))
    assert np.asarray(picture).shape == (900, 1600, 3)
    np.testing.assert_array_equal(np.asarray(picture), heatmap.overlay())
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert repr(heatmap).startswith("Heatmap(rollout of all 3 layers of attention, 1600 × 900, class ")


def test_a_pickle_holds_the_picture_and_the_grid_but_not_the_values():
    heatmap = va.heatmap(vit(), photo(300, 400), method="rollout")
    values = heatmap.values  # fills the cache with four bytes per pixel
    content = pickle.dumps(heatmap)
    assert len(content) < heatmap.image.nbytes + 2 * heatmap.explained.heatmap_hw.nbytes + 4000
    restored = pickle.loads(content)
    np.testing.assert_array_equal(restored.values, values)
    np.testing.assert_array_equal(restored.overlay(), heatmap.overlay())
    assert (restored.method, restored.prediction, restored.peak) == (heatmap.method, heatmap.prediction, heatmap.peak)


def test_to_dict_returns_plain_data_with_the_keys_of_the_manifest():
    heatmap = va.heatmap(vit(), photo(60, 80), method="rollout", class_names=list("abcdefg"))
    facts = json.loads(json.dumps(heatmap.to_dict()))
    assert (facts["width"], facts["height"]) == (80, 60)
    assert (facts["method"], facts["layer"], facts["target"]) == ("rollout", heatmap.source, heatmap.target)
    assert (facts["prediction"], facts["class"]) == (heatmap.prediction, heatmap.class_name)
    assert facts["probability"] == heatmap.probability
    assert tuple(facts["peak"]) == heatmap.peak
    np.testing.assert_array_equal(np.array(facts["heatmap"], np.float32), heatmap.explained.heatmap_hw)


def test_every_style_option_changes_the_overlay():
    heatmap = va.heatmap(vit(), photo())
    default = heatmap.overlay()
    for style in ({"colormap": "viridis"}, {"alpha": 0.2}, {"contours": [0.5]}, {"caption": True}, {"saturation": 1.0}):
        assert (heatmap.overlay(**style) != default).any()
    np.testing.assert_array_equal(heatmap.overlay(alpha=0.0, saturation=1.0)[5:55, 30:70], heatmap.image[5:55, 30:70])
    refuses(UsageError, "colormap 'infrno'", heatmap.overlay, colormap="infrno")


@pytest.mark.parametrize(
    ("model", "image", "options", "message"),
    [
        (vit(), photo().astype(np.float32), {}, "image 1 is .* float32"),
        (vit(), np.zeros((4, 4), np.uint8), {}, r"\(H, W, 3\) uint8 RGB or a tensor"),
        (vit(), [], {}, "no images"),
        (vit(), 3, {}, "an image is a file, .* got int"),
        (vit(), [torch.rand(3, 64, 64), torch.rand(3, 32, 32)], {}, "of one size"),
        (vit(), photo(), {"method": "gradcm"}, "no method 'gradcm'. Nearest: gradcam"),
        (vit(), photo(), {"method": "gate"}, "Methods that fit: dino, raw"),
        (vit(), photo(), {"method": LayerCAM(), "layer": "blocks.0"}, "a method has its own layer"),
        (vit(), photo(), {"method": "gradcam", "layer": 1}, "takes the name of a layer"),
        (vit(), photo(), {"target": 7, "method": "gradcam"}, "out of range"),
    ],
)
def test_a_wrong_call_raises_an_error_with_the_cause(model, image, options, message):
    refuses(UsageError, message, va.heatmap, model, image, **options)


def test_overlay_refuses_several_pictures_and_missing_files(tmp_path):
    refuses(UsageError, "one picture; for several call heatmap", lambda: va.overlay(vit(), [photo(), photo()]))
    refuses(DataError, "there is no image", lambda: va.overlay(vit(), tmp_path / "none.jpg"))


def test_the_package_imports_torch_only_when_a_name_is_used():
    code = (
        "import sys, visionattn as va; names = dir(va); import visionattn.drawing.overlay; "
        "assert 'torch' not in sys.modules; assert callable(va.overlay); "
        "import inspect; print(*names, *inspect.signature(va.overlay).parameters)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert {"overlay", "heatmap", "explore", "insert", "load", "attention", "maps", "method"} <= set(
        done.stdout.split()
    )
