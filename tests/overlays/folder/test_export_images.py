"""Unusual images, unusual names and failing models: each image gets an overlay or a reason for its failure."""

import io
import os
import re

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console

from tests.overlays.folder.exports import Tiny, awkward, bright, manifest, noise, overlays, photos, run, save
from visionattn.data.placement import Preprocess
from visionattn.drawing import Style, render
from visionattn.errors import DataError
from visionattn.maps.methods.cam import GradCAM

NOT_TEXT = os.fsdecode(b"caf\xe9.jpg")  # Latin-1, not valid UTF-8


def test_unusual_images_get_overlays_and_broken_images_get_reasons(tmp_path):
    expected = awkward(tmp_path / "in")
    summary = run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".png"), max_pixels=40_000)
    entries = manifest(tmp_path / "out")
    assert set(entries) == set(expected)
    good = {name for name, content in expected.items() if isinstance(content, np.ndarray)}
    assert overlays(tmp_path / "out") == {f"{name}.overlay.png" for name in good}
    assert (summary.written, summary.failed, summary.exit_code) == (len(good), len(expected) - len(good), 1)
    for name, content in expected.items():
        entry = entries[name]
        if isinstance(content, str):
            assert entry["status"] == "failed"
            assert re.search(content, entry["reason"])
            assert str(tmp_path) not in entry["reason"]  # the path is only in `source`
            assert "\n" not in entry["reason"]
            continue
        assert entry["status"] == "done"
        assert (entry["height"], entry["width"]) == content.shape[:2]
        drawn = np.array(Image.open(tmp_path / "out" / entry["outputs"]["overlay"]))
        tensor, placement = Preprocess(16)(content)
        heatmap = bright(Tiny(), torch.from_numpy(tensor)[None]).heatmaps[0].numpy()
        difference = np.abs(drawn.astype(int) - render(content, heatmap, placement, Style()))
        assert difference.max() <= 8, name  # JPEG, and one of the colormap's 256 levels


@pytest.mark.parametrize("size", [(60, 90), (90, 60), (41, 77), (77, 41)])
@pytest.mark.parametrize("fit", ["crop", "letterbox", "stretch"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_overlay_and_peak_point_at_the_object_in_the_source(tmp_path, size, fit, orientation):
    upright = np.full((*size, 3), 20, np.uint8)
    top, left = size[0] // 2 + 4, size[1] // 2 - 12
    upright[top : top + 8, left : left + 8] = 255
    turns = {1: 0, 3: 2, 6: 1, 8: 3}[orientation]  # counterclockwise quarter turns that the EXIF orientation undoes
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path / "x.png", np.rot90(upright, turns), exif=exif)
    run([path], tmp_path / "out", preprocess=Preprocess(32, fit=fit), style=Style(suffix=".png", saturation=0, alpha=1))
    entry = manifest(tmp_path / "out")["x.png"]
    x, y = entry["peak"]
    assert left - 2 <= x <= left + 10
    assert top - 2 <= y <= top + 10
    drawn = np.array(Image.open(tmp_path / "out" / "x.png.overlay.png")).astype(int)
    assert drawn.shape == upright.shape
    yellow = (drawn[..., 0] > 200) & (drawn[..., 1] > 200) & (drawn[..., 2] > 80)  # the hottest colour of inferno
    ys, xs = np.nonzero(yellow)
    assert len(ys)
    assert abs(ys.mean() + 0.5 - (top + 4)) < 3
    assert abs(xs.mean() + 0.5 - (left + 4)) < 3


def test_files_with_unusual_names_are_exported(tmp_path):
    names = [NOT_TEXT, "a" * 251 + ".png", "new\nline.png", "[red]x.png", "ảnh 犬.png", "x.PNG", "x.png"]
    for name in names:
        save(tmp_path / "in" / "plain.png", noise())
        (tmp_path / "in" / "plain.png").rename(tmp_path / "in" / name)
    (tmp_path / "in" / "[bold]empty.jpg").touch()
    text = io.StringIO()
    summary = run([tmp_path / "in"], tmp_path / "out", console=Console(file=text, width=300))
    assert (summary.written, summary.failed) == (len(names), 1)
    assert "[bold]empty.jpg: is empty" in text.getvalue()
    entries = manifest(tmp_path / "out")
    assert {*names, "[bold]empty.jpg"} == set(entries)
    assert {entries[name]["outputs"]["overlay"] for name in names} == overlays(tmp_path / "out")
    assert run([tmp_path / "in"], tmp_path / "out").skipped == len(names)


@pytest.mark.parametrize("out", ["in", "in/seen", "link"])
def test_outputs_inside_the_input_folder_are_not_read_as_images(tmp_path, out):
    photos(tmp_path / "in", 3)
    photos(tmp_path / "in" / "more", 2)
    (tmp_path / "link").symlink_to(tmp_path / "in")
    assert run([tmp_path / "in"], tmp_path / out).written == 5
    assert run([tmp_path / "in"], tmp_path / out).skipped == 5
    assert run([tmp_path / "in"], tmp_path / out, target=1).written == 5
    assert len(overlays(tmp_path / out)) == 5


def test_a_folder_that_cannot_be_listed_fails_and_the_others_are_exported(tmp_path, monkeypatch):
    photos(tmp_path / "in", 2)
    photos(tmp_path / "in" / "locked", 2)
    scandir = os.scandir

    def refusing(path="."):
        if os.fspath(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed, summary.exit_code) == (2, 1, 1)
    assert summary.failures == [("locked", "cannot be listed: Permission denied")]


def test_only_the_image_that_the_method_refuses_fails(tmp_path):
    photos(tmp_path / "in", 7)
    save(tmp_path / "in" / "3.png", np.full((20, 20, 3), 255, np.uint8))

    def refuse_uniform(model, images_BCHW, *, target=None):
        if (images_BCHW.std((1, 2, 3)) < 0.5).any():
            raise DataError("the images hold NaN or infinity")
        return bright(model, images_BCHW)

    summary = run([tmp_path / "in"], tmp_path / "out", method=refuse_uniform)
    assert (summary.written, summary.failed) == (6, 1)
    assert manifest(tmp_path / "out")["3.png"]["reason"] == "the images hold NaN or infinity"


def test_a_model_with_nan_weights_ends_the_run_with_an_error(tmp_path):
    photos(tmp_path / "in", 4)
    model = Tiny()
    model.conv.weight.data[0] = float("nan")
    with pytest.raises(DataError, match=r"conv\.weight holds NaN"):
        run([tmp_path / "in"], tmp_path / "out", model=model, method=GradCAM())
    assert not overlays(tmp_path / "out")


def test_a_constant_heatmap_is_written_and_counted_as_blank(tmp_path):
    save(tmp_path / "in" / "grey.png", np.full((20, 30, 3), 90, np.uint8))
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.blank) == (1, 1)
    assert manifest(tmp_path / "out")["grey.png"]["peak"] is None
