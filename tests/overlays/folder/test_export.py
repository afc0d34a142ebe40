"""Whole exports: lines of the manifest, lists of images, wrong calls, and folders that cannot be written."""

import dataclasses
import os

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from tests.overlays.folder.disks import disk_full_after
from tests.overlays.folder.exports import Tiny, bright, manifest, noise, overlays, photos, run, save
from tests.refusals import refuses
from visionattn.drawing.rendering import Style
from visionattn.errors import DataError, UsageError
from visionattn.maps.cam import GradCAM

CLASSES = ("cat", "dog", "owl")


def test_a_line_has_the_documented_keys(tmp_path):
    photos(tmp_path / "in", 2)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    run([tmp_path / "in"], tmp_path / "out", method=GradCAM(), class_names=CLASSES, model_name="tiny")
    entries = manifest(tmp_path / "out")
    about = {"source", "bytes", "modified", "fingerprint", "status"}
    told = {"outputs", "width", "height", "model", "method", "layer", "target", "prediction", "class", "probability"}
    assert set(entries["0.png"]) == about | told | {"peak", "seconds"}
    assert set(entries["bad.jpg"]) == about | {"reason"}
    assert len({entry["fingerprint"] for entry in entries.values()}) == 1
    for name, entry in entries.items():
        state = (tmp_path / "in" / name).stat()
        assert entry["source"] == str(tmp_path / "in" / name)
        assert (entry["bytes"], entry["modified"]) == (state.st_size, state.st_mtime_ns)
    one = entries["1.png"]
    assert one["outputs"] == {"overlay": "1.png.overlay.jpg"}
    assert (one["width"], one["height"]) == (30, 21)
    assert (one["model"], one["method"]) == ("tiny", "gradcam")
    assert "conv" in one["layer"]
    assert one["target"] == one["prediction"]
    assert 0 <= one["peak"][0] <= 30
    assert 0 <= one["peak"][1] <= 21
    assert 0 < one["seconds"] < 10


def test_a_disk_too_full_for_the_manifest_ends_the_run_and_the_next_one_goes_on(tmp_path):
    photos(tmp_path / "in", 12)
    with disk_full_after(3000), pytest.raises(DataError, match="cannot be written: File too large; nothing more"):
        run([tmp_path / "in"], tmp_path / "out")
    noted = len(manifest(tmp_path / "out"))
    assert 0 < noted < 12
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.skipped, summary.written) == (noted, 12 - noted)
    assert len(manifest(tmp_path / "out")) == len(overlays(tmp_path / "out")) == 12
    assert len(os.listdir(tmp_path / "out")) == 13  # nothing is left behind


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere/out"])
def test_a_folder_that_cannot_be_created_is_an_error_of_one_sentence(tmp_path, out):
    photos(tmp_path / "in", 1)
    (tmp_path / "file").touch()
    with pytest.raises((UsageError, DataError), match=r"is a file; name|Not a directory|No such file") as caught:
        run([tmp_path / "in"], tmp_path / out)
    assert "\n" not in str(caught.value)


def test_a_run_in_which_all_images_fail_finishes(tmp_path):
    for number in range(9):
        save(tmp_path / "in" / f"{number}.png", noise()).write_bytes(b"")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed, summary.exit_code) == (0, 9, 1)
    assert os.listdir(tmp_path / "out") == ["manifest.jsonl"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "must be ≥ 1, got 0"),
        ({"max_pixels": 0}, "must be ≥ 1"),
        ({"workers": 0}, "must be ≥ 1"),
        ({"class_names": ("cat", "dog")}, "2 class names, and the model has 3 outputs"),
        ({"method": GradCAM(), "target": 3}, "out of range: the model has 3 outputs"),
        ({"method": GradCAM(layer="cnov")}, "cnov"),
    ],
)
def test_wrong_calls_are_refused_and_write_no_overlay(tmp_path, options, words):
    photos(tmp_path / "in", 2)
    refuses(UsageError, words, lambda: run([tmp_path / "in"], tmp_path / "out", **options))
    assert not overlays(tmp_path / "out")


def test_a_list_sets_the_target_and_the_boxes_of_each_image(tmp_path):
    photos(tmp_path / "in", 5)
    lines = [
        "path,target,x0,y0,x1,y1,label", "0.png,dog", "1.png,0,2,2,20,15,thing", "2.png", "3.png,wolf", "4.png,99",
        "gone.png",
    ]  # fmt: skip
    (tmp_path / "in" / "list.csv").write_text("\n".join(lines))
    options = {"method": GradCAM(), "class_names": CLASSES, "style": Style(suffix=".png")}
    summary = run([tmp_path / "in" / "list.csv"], tmp_path / "out", **options)
    entries = manifest(tmp_path / "out")
    assert [entries[f"{number}.png"]["target"] for number in range(2)] == [1, 0]
    assert entries["2.png"]["target"] == entries["2.png"]["prediction"]
    assert "no class 'wolf'" in entries["3.png"]["reason"]
    assert "out of range: the model has 3 outputs" in entries["4.png"]["reason"]
    assert entries["gone.png"]["reason"].startswith("there is no")
    assert (summary.written, summary.failed) == (3, 3)
    run([tmp_path / "in"], tmp_path / "plain", target=0, **options)
    with_box, without = (np.array(Image.open(tmp_path / out / "1.png.overlay.png")) for out in ("out", "plain"))
    rows, columns = np.nonzero((with_box != without).any(2))
    assert (rows.min(), columns.min()) == (2, 2)
    assert (with_box != without).any(2)[14, 2:20].all()
    assert run([tmp_path / "in" / "list.csv"], tmp_path / "out", **options).skipped == 3
    (tmp_path / "in" / "list.csv").write_text("\n".join(lines).replace("0.png,dog", "0.png,cat"))
    assert run([tmp_path / "in" / "list.csv"], tmp_path / "out", **options).written == 1


@pytest.mark.parametrize("way", ["unwritable", "read-only manifest"])
def test_a_folder_that_cannot_be_written_fails_its_images_or_the_run(tmp_path, way, monkeypatch):
    photos(tmp_path / "in" / "a", 2)
    photos(tmp_path / "in" / "b", 2)
    real = os.makedirs

    def refusing(path, *args, **options):
        if os.fspath(path).endswith("a" if way == "unwritable" else "out"):
            raise PermissionError(13, "Permission denied", path)
        return real(path, *args, **options)

    monkeypatch.setattr(os, "makedirs", refusing)
    if way == "unwritable":
        summary = run([tmp_path / "in"], tmp_path / "out")
        assert (summary.written, summary.failed, summary.exit_code) == (2, 2, 1)
        assert all(
            reason == "cannot be made: Permission denied" or "cannot be made" in reason
            for _, reason in summary.failures
        )
    else:
        refuses(DataError, "Permission denied", lambda: run([tmp_path / "in"], tmp_path / "out"))


class Detector(nn.Module):
    """Always finds the same in the input: one thing for sure, and one that it doubts."""

    def forward(self, images_BCHW):
        found = {
            "boxes": torch.tensor([[2.0, 4.0, 10.0, 12.0], [0.0, 0.0, 3.0, 3.0]]),
            "scores": torch.tensor([0.9, 0.2]),
            "labels": torch.tensor([1, 0]),
        }
        return [found for _ in images_BCHW]


def shown_by_a_detector(model, images_BCHW, *, target=None):
    return dataclasses.replace(bright(Tiny(), images_BCHW), output=model(images_BCHW))


def test_detected_boxes_are_drawn_in_pixels_of_the_source(tmp_path):
    save(tmp_path / "in" / "x.png", noise(40, 60))
    options = {"method": shown_by_a_detector, "class_names": CLASSES, "style": Style(suffix=".png")}
    run([tmp_path / "in"], tmp_path / "out", model=Detector(), **options)
    entry = manifest(tmp_path / "out")["x.png"]
    ((left, top, right, bottom, label),) = entry["found"]
    # a crop of 40 × 40 from column 10 on, which the input of 16 × 16 shows
    assert [left, top, right, bottom] == pytest.approx([10 + 2 * 2.5, 4 * 2.5, 10 + 10 * 2.5, 12 * 2.5], abs=0.2)
    assert label == "dog 0.90"
    assert entry["prediction"] is None
    run([tmp_path / "in"], tmp_path / "plain", **{**options, "method": bright})
    with_box, without = (np.array(Image.open(tmp_path / out / "x.png.overlay.png")) for out in ("out", "plain"))
    changed = (with_box != without).any(2)
    assert changed[10:30, 15].all()
    assert changed[29, 15:35].all()
    assert not changed[31:].any()
