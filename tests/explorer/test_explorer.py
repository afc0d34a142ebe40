"""`explore`: the size of a page, pages without a model, failures and errors."""

import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from tests.explorer.explored import CLASSES, PREPROCESS, photo, vit, weights_of
from tests.explorer.pages import facts, weights_on_page
from tests.refusals import refuses
from visionattn.data.placement import Preprocess
from visionattn.errors import DataError, MapWarning, UsageError
from visionattn.explorer.explorer import explore
from visionattn.maps import METHODS, RawAttention


def test_levels_are_reduced_until_the_page_fits_and_their_error_is_bounded():
    model, pictures = vit(depth=4), [photo(seed=seed) for seed in range(5)]
    options = {"preprocess": PREPROCESS, "steps": 0, "methods": {"raw": RawAttention()}}
    fine = explore(model, pictures, **options)
    limit = len(fine.html) - 2_000
    page = explore(model, pictures, limit=limit, **options)
    assert len(page.html.encode()) <= limit
    assert 3 <= page.levels < 256
    for image, picture in enumerate(pictures):
        weights = weights_of(model, picture)
        for layer in range(4):
            found_1HQK, _ = weights_on_page(page, layer, image)
            rows = weights[layer][:, [*range(1, 13), 0]][:, :, 1:]
            span = rows.max(-1, keepdims=True) - rows.min(-1, keepdims=True) + 0.005 * rows.max(-1, keepdims=True)
            assert (np.abs(found_1HQK[0, :, :, :12] - rows) <= span * 0.5 / (page.levels - 1) * 1.001 + 1e-6).all()
    with pytest.raises(UsageError, match=r"limit is .* MB; explore fewer images"):
        explore(model, pictures, limit=limit // 4, **options)


def test_explore_leaves_the_model_unchanged():
    model = vit().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    explore(model, torch.randn(1, 3, 48, 64), steps=2, methods={"raw": RawAttention()})
    assert all(module.training for module in model.modules())
    assert hooks == [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_given_glimpses_and_boxes_are_shown_without_a_model():
    random = np.random.default_rng(0)
    glimpses = {
        "locations": random.uniform(0, 50, (3, 2)),
        "boxes": random.uniform(0, 50, (3, 2, 4)),
        "patches": random.integers(0, 256, (3, 2, 8, 8, 3), dtype=np.uint8),
        "probabilities": random.dirichlet(np.ones(4), 3),
    }
    boxes = {"boxes": [[1, 2, 30, 40]], "labels": [2], "scores": [0.75], "maps": random.random((1, 5, 6))}
    options = {"preprocess": Preprocess(32), "glimpses": [glimpses], "detections": [boxes], "class_names": CLASSES}
    page = explore(None, [photo()], **options)
    shown = facts(page)["pictures"][0]
    np.testing.assert_allclose(shown["glimpses"]["locations"], glimpses["locations"], atol=0.006)
    classes = shown["glimpses"]["classes"]
    np.testing.assert_allclose(shown["glimpses"]["probabilities"], glimpses["probabilities"][:, classes], atol=1e-5)
    assert shown["detections"]["labels"] == [2]
    assert facts(page)["classes"]["2"] == "cup"
    for name, short in (("locations", glimpses["locations"][:2]), ("boxes", glimpses["boxes"][..., :2])):
        with pytest.raises(UsageError, match="glimpses are locations"):
            explore(None, [photo()], preprocess=Preprocess(32), glimpses=[{**glimpses, name: short}])
    too_many_maps = {**boxes, "maps": random.random((2, 5, 6))}
    with pytest.raises(UsageError, match="1 boxes, 1 labels, 1 scores and 2 maps"):
        explore(None, [photo()], preprocess=Preprocess(32), detections=[too_many_maps])
    with pytest.raises(UsageError, match="1 glimpses for 2 images"):
        explore(None, [photo()] * 2, preprocess=Preprocess(32), glimpses=[glimpses])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "there are no images"),
        (torch.zeros(3, 48, 64), "images must be"),
        ("cat.png", "a list of files"),
        ([np.zeros((4, 4), np.uint8)], "uint8 RGB"),
    ],
)
def test_wrong_images_are_errors(images, message):
    refuses(UsageError, message, lambda: explore(vit(), images, preprocess=PREPROCESS))


def test_wrong_inputs_of_explore_are_errors():
    class Plain(nn.Module):
        def forward(self, x):
            return F.relu(x).mean((2, 3))

    with pytest.raises(UsageError, match="nothing to show of this Plain"):
        explore(Plain(), torch.randn(1, 3, 8, 8), methods={}, steps=0)
    with pytest.warns(MapWarning, match="Plain does not say how"), pytest.raises(UsageError, match="nothing to show"):
        explore(Plain(), [photo()], methods={}, steps=0)
    with pytest.raises(UsageError, match="2 class names, but the model has 4"):
        explore(vit(), [photo()], preprocess=PREPROCESS, class_names=("a", "b"), steps=0)
    refuses(UsageError, "steps must be", lambda: explore(vit(), [photo()], preprocess=PREPROCESS, steps=1))


def test_a_broken_file_is_reported_and_the_other_images_are_shown(tmp_path):
    Image.fromarray(photo()).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no picture")
    options = {"preprocess": PREPROCESS, "steps": 0, "methods": {"raw": RawAttention()}}
    page = explore(vit(), [tmp_path / "bad.png", tmp_path / "good.png"], **options)
    assert (page.images, [name for name, _ in page.failures]) == (1, ["bad.png"])
    assert facts(page)["pictures"][0]["name"] == "good.png"
    assert str(tmp_path) not in page.html  # the page does not hold the user's folders
    refuses(DataError, "none of the 1 images can be read", lambda: explore(vit(), [tmp_path / "bad.png"], **options))


def test_a_method_that_does_not_fit_the_model_is_reported():
    methods = {"raw": RawAttention(), "gate": METHODS["gate"]()}
    page = explore(vit(), [photo()], preprocess=PREPROCESS, steps=0, methods=methods)
    assert list(page.left_out) == ["gate"]
    assert "gate needs gates over positions" in page.left_out["gate"]
    assert facts(page)["pictures"][0]["failed"] == page.left_out


def test_repr_to_dict_and_pickle_of_a_page(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    Image.fromarray(photo()).save(tmp_path / "good.png")
    files = [tmp_path / "good.png", tmp_path / "bad.png"]
    methods = {"raw": RawAttention(), "gate": METHODS["gate"]()}
    page = explore(vit(), files, preprocess=PREPROCESS, steps=0, methods=methods)
    first, *lines = str(page).splitlines()
    assert first == f"Page({len(page.html.encode()) / 1e6:.1f} MB, 1 image, weights of patches in 256 levels)"
    assert lines[0].startswith("  bad.png is not shown: ")
    assert lines[1].startswith("  gate has no heatmap: gate needs gates over positions")
    assert page._repr_html_().startswith("<iframe")
    as_dict = json.loads(json.dumps(page.to_dict()))
    assert (as_dict["images"], as_dict["levels"], as_dict["bytes"]) == (1, 256, len(page.html.encode()))
    assert as_dict["left_out"] == dict(page.left_out)
    data = pickle.dumps(page)
    assert len(data) < len(page.html.encode()) + 2_000
    assert pickle.loads(data).html == page.html
