"""Heatmaps and overlays of single pictures."""

import io
import json
import pickle
import subprocess
import sys

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
from visionattn.errors import DataError, UsageError
from visionattn.maps import LayerCAM, Rollout


class Bright(nn.Module):
    """Says how bright the picture is: the map of its only layer is the brightness itself."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Conv2d(3, 1, 8, stride=8, bias=False)
        nn.init.constant_(self.layer.weight, 1 / 192)

    def forward(self, x_BCHW):
        mean_B1 = self.layer(x_BCHW).mean((2, 3))
        return torch.cat([mean_B1, -mean_B1], 1)


PLAIN = Preprocess(64, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))


def lit(x, y, size=20, height=100, width=200):
    """A dark picture with a white square; the square's centre lies at (x, y)."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[y - size // 2 : y + size // 2, x - size // 2 : x + size // 2] = 255
    return picture


@pytest.mark.parametrize(("x", "y"), [(80, 30), (120, 70), (100, 50)])
def test_the_heat_lies_on_the_object_in_pixels_of_the_source(x, y):
    seen = va.heatmap(Bright(), lit(x, y), method="layercam", target=0, preprocess=PLAIN)
    assert seen.values.shape == (100, 200)
    assert seen.values.dtype == np.float32
    assert seen.values.min() == 0
    assert seen.values.max() <= 1
    np.testing.assert_allclose(seen.peak, (x, y), atol=12.5)  # a cell is 100 · 8 / 64 pixels wide
    row, column = np.unravel_index(seen.values.argmax(), seen.values.shape)
    np.testing.assert_allclose((column, row), (x, y), atol=12.5)
    total = seen.values.sum()
    centre = [(seen.values.sum(axis) * np.arange(size)).sum() / total for axis, size in ((0, 200), (1, 100))]
    np.testing.assert_allclose(centre, (x, y), atol=3)
    assert not seen.values[:, :50].any()  # the middle square was seen, and nothing else
    assert not seen.values[:, 150:].any()


def test_a_heatmap_gives_the_overlay_that_the_command_line_writes(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "photo.png")
    arguments = ["overlay", "--images", str(tmp_path / "photo.png"), "--out", str(tmp_path / "seen"), "--format", "png"]
    assert main([*arguments, "--model", "test_vit", "--weights", "random", "--save", "overlay", "heatmap"]) == 0
    torch.manual_seed(0)
    seen = va.heatmap(timm.create_model("test_vit"), tmp_path / "photo.png")
    np.testing.assert_array_equal(seen.overlay(), read_image(tmp_path / "seen" / "photo.png.overlay.png"))
    written = np.array(Image.open(tmp_path / "seen" / "photo.png.heatmap.png"))
    np.testing.assert_allclose(seen.values, written / 65535, atol=1 / 65535)
    seen.save(tmp_path / "again.png")
    np.testing.assert_array_equal(read_image(tmp_path / "again.png"), seen.overlay())


def test_files_arrays_and_tensors_of_a_picture_give_the_same_heatmap(tmp_path):
    model, picture = vit(), photo()
    Image.fromarray(picture).save(tmp_path / "photo.png")
    forms = [tmp_path / "photo.png", str(tmp_path / "photo.png"), Image.fromarray(picture), picture]
    several = va.heatmap(model, forms, method="rollout")
    alone = [va.heatmap(model, form, method=Rollout()) for form in forms]
    for found in (*several, *alone):
        np.testing.assert_array_equal(found.image, picture)
        np.testing.assert_allclose(found.values, alone[0].values, atol=1e-5)
        assert (found.method, found.prediction) == ("rollout", alone[0].prediction)
    values, _ = Preprocess(64, crop_fraction=0.9, mean=(0.5,) * 3, std=(0.5,) * 3)(picture)
    prepared = va.heatmap(model, torch.from_numpy(values), method="rollout")
    np.testing.assert_array_equal(prepared.explained.raw_hw, alone[0].explained.raw_hw)
    assert prepared.image.shape == (64, 64, 3)
    batch = torch.from_numpy(values)[None].expand(2, -1, -1, -1)
    assert len(va.heatmap(model, batch, preprocess=Preprocess(mean=(0.5,) * 3, std=(0.5,) * 3))) == 2


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
def test_the_model_is_left_as_it_was(training):
    model = vit().train(training)
    va.overlay(model, photo(), method="gradcam", target=2)
    assert model.training == training
    assert all(module.training == training for module in model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_models_of_torchvision_and_classifiers_have_their_own_preprocessing():
    resnet = torchvision.models.resnet18()
    shown = va.heatmap(resnet, photo(300, 400), layer="layer3")
    assert shown.explained.placement.input_size == (224, 224)
    np.testing.assert_allclose(shown.explained.placement.matrix[0, 0], 256 / 300, rtol=0.01)  # 256 shrink to 300
    assert shown.source == "layer3"
    classifier = va.models.Classifier("test_vit", num_classes=3, options={"img_size": 96})
    assert va.heatmap(classifier, photo()).explained.placement.input_size == (96, 96)


def test_a_checkpoint_has_its_preprocessing_and_class_names(quick_run):
    task = va.load(quick_run / "best.ckpt")
    seen = va.heatmap(task, photo(64, 64))
    of_network = va.heatmap(task.network, photo(64, 64), preprocess=task.preprocess, class_names=task.class_names)
    np.testing.assert_array_equal(seen.values, of_network.values)
    assert seen.class_name == task.class_names[seen.prediction] == of_network.class_name
    with torch.no_grad():
        values, _ = task.preprocess(photo(64, 64))
        probabilities = task.network(torch.from_numpy(values)[None]).softmax(1)[0]
    assert seen.prediction == probabilities.argmax()
    assert seen.probability == pytest.approx(probabilities.max().item(), abs=1e-5)
    chosen = va.heatmap(task, photo(64, 64), method="gradcam", target=task.class_names[3])
    assert chosen.target == 3
    page = va.explore(task, [photo(64, 64)], steps=0)
    assert page.images == 1


def test_a_models_attribute_network_does_not_replace_the_model():
    class Flipped(nn.Module):
        """Holds its network under the name that tasks use, and shows it pictures upside down."""

        def __init__(self):
            super().__init__()
            self.network = Bright()

        def forward(self, x_BCHW):
            return 5 - self.network(x_BCHW.flip(2))

    seen = va.heatmap(Flipped(), lit(50, 20, height=100, width=100), method="layercam", target=1, preprocess=PLAIN)
    assert seen.probability == pytest.approx(1 / (1 + np.exp(-2 * 0.04)), abs=0.005)
    assert seen.prediction == 1


def test_every_picture_has_its_target():
    model, pictures = vit(), [photo(seed=0), photo(seed=1)]
    both = va.heatmap(model, pictures, method="gradcam", target=[1, 4])
    assert [found.target for found in both] == [1, 4]
    for found, picture, target in zip(both, pictures, (1, 4), strict=True):
        alone = va.heatmap(model, picture, method="gradcam", target=target)
        np.testing.assert_allclose(found.values, alone.values, atol=1e-4)


def test_a_notebook_shows_the_overlay_of_a_heatmap():
    seen = va.heatmap(vit(), photo(900, 1600))
    with Image.open(io.BytesIO(seen._repr_png_())) as shown:
        assert shown.size == (768, 432)
    picture = va.overlay(vit(), photo(900, 1600))
    assert np.asarray(picture).shape == (900, 1600, 3)
    np.testing.assert_array_equal(np.asarray(picture), seen.overlay())
    assert picture._repr_png_().startswith(b"\x89PNG")
    assert repr(seen).startswith("Heatmap(raw of attention of blocks.2.attn, 1600 × 900, class ")


def test_a_heatmap_is_pickled_at_the_size_of_its_picture_and_grid():
    seen = va.heatmap(vit(), photo(300, 400), method="rollout")
    values = seen.values  # cached, and four bytes a pixel
    content = pickle.dumps(seen)
    assert len(content) < seen.image.nbytes + 2 * seen.explained.heatmap_hw.nbytes + 4000
    again = pickle.loads(content)
    np.testing.assert_array_equal(again.values, values)
    np.testing.assert_array_equal(again.overlay(), seen.overlay())
    assert (again.method, again.prediction, again.peak) == (seen.method, seen.prediction, seen.peak)


def test_a_heatmap_becomes_plain_data_with_the_manifest_s_keys():
    seen = va.heatmap(vit(), photo(60, 80), method="rollout", class_names=list("abcdefg"))
    plain = json.loads(json.dumps(seen.to_dict()))
    assert (plain["width"], plain["height"]) == (80, 60)
    assert (plain["method"], plain["layer"], plain["target"]) == ("rollout", seen.source, seen.target)
    assert (plain["prediction"], plain["class"]) == (seen.prediction, seen.class_name)
    assert plain["probability"] == seen.probability
    assert tuple(plain["peak"]) == seen.peak
    np.testing.assert_array_equal(np.array(plain["heatmap"], np.float32), seen.explained.heatmap_hw)


def test_overlays_change_with_each_option_of_style():
    seen = va.heatmap(vit(), photo())
    plain = seen.overlay()
    for look in ({"colormap": "viridis"}, {"alpha": 0.2}, {"contours": [0.5]}, {"caption": True}, {"saturation": 1.0}):
        assert (seen.overlay(**look) != plain).any()
    np.testing.assert_array_equal(seen.overlay(alpha=0.0, saturation=1.0)[5:55, 30:70], seen.image[5:55, 30:70])
    refuses(UsageError, "colormap 'infrno'", seen.overlay, colormap="infrno")


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
        (Bright(), photo(), {}, "pass preprocess="),
    ],
)
def test_a_wrong_call_raises_an_error_of_one_sentence(model, image, options, message):
    refuses(UsageError, message, va.heatmap, model, image, **options)


def test_overlay_takes_one_picture(tmp_path):
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
