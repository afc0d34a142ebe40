"""Exports of folders: the manifest, lists of images, wrong calls, and folders that cannot be written."""

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
from visionattn.drawing import Style
from visionattn.errors import DataError, UsageError
from visionattn.maps.methods.cam import GradCAM
from visionattn.overlays import export

CLASSES = ("cat", "dog", "owl")


def test_a_line_of_the_manifest_has_the_documented_keys(tmp_path):
    photos(tmp_path / "in", 2)
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no")
    run([tmp_path / "in"], tmp_path / "out", method=GradCAM(), class_names=CLASSES, model_name="tiny")
    entries = manifest(tmp_path / "out")
    common = {"source", "bytes", "modified", "fingerprint", "status"}
    of_done = {"outputs", "width", "height", "model", "method", "layer", "target", "prediction", "class", "probability"}
    assert set(entries["0.png"]) == common | of_done | {"peak", "seconds"}
    assert set(entries["bad.jpg"]) == common | {"reason"}
    assert len({entry["fingerprint"] for entry in entries.values()}) == 1
    for name, entry in entries.items():
        state = (tmp_path / "in" / name).stat()
        assert entry["source"] == str(tmp_path / "in" / name)
        assert (entry["bytes"], entry["modified"]) == (state.st_size, state.st_mtime_ns)
    entry = entries["1.png"]
    assert entry["outputs"] == {"overlay": "1.png.overlay.jpg"}
    assert (entry["width"], entry["height"]) == (30, 21)
    assert (entry["model"], entry["method"]) == ("tiny", "gradcam")
    assert "conv" in entry["layer"]
    assert entry["target"] == entry["prediction"]
    assert 0 <= entry["peak"][0] <= 30
    assert 0 <= entry["peak"][1] <= 21
    assert 0 < entry["seconds"] < 10


def test_a_full_disk_under_the_manifest_ends_the_run_and_the_next_run_continues(tmp_path):
    photos(tmp_path / "in", 12)
    with disk_full_after(3000), pytest.raises(DataError, match="cannot be written: File too large; nothing more"):
        run([tmp_path / "in"], tmp_path / "out")
    listed = len(manifest(tmp_path / "out"))
    assert 0 < listed < 12
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.skipped, summary.written) == (listed, 12 - listed)
    assert len(manifest(tmp_path / "out")) == len(overlays(tmp_path / "out")) == 12
    assert len(os.listdir(tmp_path / "out")) == 13  # 12 overlays and the manifest, no temporary file


@pytest.mark.parametrize("out", ["file", "file/below", "/proc/nowhere/out"])
def test_an_output_folder_that_cannot_be_created_raises_a_one_line_error(tmp_path, out):
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


def test_a_list_of_images_sets_the_target_and_the_boxes_of_each_image(tmp_path):
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
    assert "no class '99'. The 3 classes are numbered from 0: cat, dog, owl" in entries["4.png"]["reason"]
    assert entries["gone.png"]["reason"].startswith("there is no")
    assert (summary.written, summary.failed) == (3, 3)
    run([tmp_path / "in"], tmp_path / "no_boxes", target=0, **options)
    with_box, without = (np.array(Image.open(tmp_path / out / "1.png.overlay.png")) for out in ("out", "no_boxes"))
    rows, columns = np.nonzero((with_box != without).any(2))
    assert (rows.min(), columns.min()) == (2, 2)
    assert (with_box != without).any(2)[14, 2:20].all()
    assert run([tmp_path / "in" / "list.csv"], tmp_path / "out", **options).skipped == 3
    (tmp_path / "in" / "list.csv").write_text("\n".join(lines).replace("0.png,dog", "0.png,cat"))
    assert run([tmp_path / "in" / "list.csv"], tmp_path / "out", **options).written == 1


@pytest.mark.parametrize("folder", ["a", "out"])
def test_images_fail_if_their_folder_cannot_be_created_and_the_run_ends_if_out_cannot(tmp_path, folder, monkeypatch):
    photos(tmp_path / "in" / "a", 2)
    photos(tmp_path / "in" / "b", 2)
    makedirs = os.makedirs

    def refusing(path, *args, **options):
        if os.fspath(path).endswith(folder):
            raise PermissionError(13, "Permission denied", path)
        return makedirs(path, *args, **options)

    monkeypatch.setattr(os, "makedirs", refusing)
    if folder == "a":
        summary = run([tmp_path / "in"], tmp_path / "out")
        assert (summary.written, summary.failed, summary.exit_code) == (2, 2, 1)
        assert all(
            reason == "cannot be made: Permission denied" or "cannot be made" in reason
            for _, reason in summary.failures
        )
    else:
        refuses(DataError, "Permission denied", lambda: run([tmp_path / "in"], tmp_path / "out"))


class Detector(nn.Module):
    """Returns the same two boxes for every image, one with a high and one with a low score."""

    def forward(self, images_BCHW):
        found = {
            "boxes": torch.tensor([[2.0, 4.0, 10.0, 12.0], [0.0, 0.0, 3.0, 3.0]]),
            "scores": torch.tensor([0.9, 0.2]),
            "labels": torch.tensor([1, 0]),
        }
        return [found for _ in images_BCHW]


def detect(model, images_BCHW, *, target=None):
    return dataclasses.replace(bright(Tiny(), images_BCHW), output=model(images_BCHW))


def test_detected_boxes_are_drawn_in_pixels_of_the_source(tmp_path):
    save(tmp_path / "in" / "x.png", noise(40, 60))
    options = {"method": detect, "class_names": CLASSES, "style": Style(suffix=".png")}
    run([tmp_path / "in"], tmp_path / "out", model=Detector(), **options)
    entry = manifest(tmp_path / "out")["x.png"]
    ((left, top, right, bottom, label),) = entry["found"]
    # the input of 16 × 16 shows a crop of 40 × 40 that begins at column 10
    assert [left, top, right, bottom] == pytest.approx([10 + 2 * 2.5, 4 * 2.5, 10 + 10 * 2.5, 12 * 2.5], abs=0.2)
    assert label == "dog 0.90"
    assert entry["prediction"] is None
    run([tmp_path / "in"], tmp_path / "no_boxes", **{**options, "method": bright})
    with_box, without = (np.array(Image.open(tmp_path / out / "x.png.overlay.png")) for out in ("out", "no_boxes"))
    changed = (with_box != without).any(2)
    assert changed[10:30, 15].all()
    assert changed[29, 15:35].all()
    assert not changed[31:].any()


def test_export_without_an_explainer_is_refused(tmp_path):
    refuses(UsageError, "there is no explainer; pass at least one", export, [tmp_path], tmp_path / "out", [])
