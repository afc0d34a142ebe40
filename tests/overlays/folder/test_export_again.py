"""A second export makes only missing outputs and outputs of changed images."""

import os
from functools import partial

import pytest

from tests.overlays.folder.exports import (
    Tiny,
    awkward,
    bright,
    manifest,
    noise,
    other_weights,
    overlays,
    photos,
    run,
    save,
    snapshot,
)
from visionattn.data.placement import Preprocess
from visionattn.drawing import Style

CLASSES = ("cat", "dog", "owl")


def test_a_second_run_changes_nothing(tmp_path):
    awkward(tmp_path / "in")
    first = run([tmp_path / "in"], tmp_path / "out", max_pixels=40_000)
    before = snapshot(tmp_path / "out")
    second = run([tmp_path / "in"], tmp_path / "out", max_pixels=40_000)
    assert snapshot(tmp_path / "out") == before
    assert (second.written, second.skipped, second.failed) == (0, first.written, first.failed)
    assert second.exit_code == 1


def test_outputs_of_changed_images_and_missing_outputs_are_made_again_and_the_others_kept(tmp_path):
    photos(tmp_path / "in")
    run([tmp_path / "in"], tmp_path / "out")
    before = snapshot(tmp_path / "out")
    save(tmp_path / "in" / "2.png", noise(seed=99))
    os.utime(tmp_path / "in" / "4.png", ns=(1, 1))
    (tmp_path / "out" / "5.png.overlay.jpg").unlink()
    save(tmp_path / "in" / "7.png", noise(seed=7))
    (tmp_path / "in" / "6.png").write_bytes(b"")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.skipped, summary.failed) == (4, 3, 1)
    changed = {path.name for path, content in snapshot(tmp_path / "out").items() if before.get(path) != content}
    assert changed == {"manifest.jsonl"} | {f"{number}.png.overlay.jpg" for number in (2, 4, 5, 7)}
    entries = manifest(tmp_path / "out")
    assert entries["4.png"]["modified"] == 1
    assert entries["6.png"]["earlier"] == ["6.png.overlay.jpg"]


@pytest.mark.parametrize(
    "change",
    [
        {"style": Style(alpha=0.7)},
        {"target": 1},
        {"preprocess": Preprocess(16, fit="stretch")},
        {"model": other_weights()},
        {"method": partial(bright, contrast=3)},
        {"class_names": CLASSES},
    ],
    ids=lambda change: next(iter(change)),
)
def test_settings_in_the_fingerprint_make_all_outputs_again(tmp_path, change):
    photos(tmp_path / "in", 4)
    method = {"method": partial(bright, contrast=2)}
    run([tmp_path / "in"], tmp_path / "out", **method)
    assert run([tmp_path / "in"], tmp_path / "out", **{**method, **change}).written == 4
    assert run([tmp_path / "in"], tmp_path / "out", **{**method, **change}).skipped == 4
    assert run([tmp_path / "in"], tmp_path / "out", **method).written == 4
    assert len(manifest(tmp_path / "out")) == 4


def test_settings_outside_the_fingerprint_make_no_output_again(tmp_path):
    photos(tmp_path / "in", 4)
    run([tmp_path / "in"], tmp_path / "out")
    settings = {"batch_size": 1, "workers": 1, "max_pixels": 10_000, "model": Tiny().eval()}
    assert run([tmp_path / "in"], tmp_path / "out", **settings).skipped == 4


def test_an_export_in_another_format_keeps_the_earlier_files(tmp_path):
    photos(tmp_path / "in", 2)
    run([tmp_path / "in"], tmp_path / "out")
    run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".webp"))
    assert overlays(tmp_path / "out") == {f"{n}.png.overlay.{kind}" for n in range(2) for kind in ("jpg", "webp")}
    assert manifest(tmp_path / "out")["0.png"]["earlier"] == ["0.png.overlay.jpg"]


def test_a_run_with_other_kinds_of_output_keeps_the_earlier_kinds(tmp_path):
    photos(tmp_path / "in", 3)
    first = run([tmp_path / "in"], tmp_path / "out")
    before = snapshot(tmp_path / "out")
    second = run([tmp_path / "in"], tmp_path / "out", save=("heatmap", "mask", "array"))
    assert (first.written, second.written) == (3, 3)
    entry = manifest(tmp_path / "out")["1.png"]
    assert entry["outputs"] == {
        "overlay": "1.png.overlay.jpg",
        "heatmap": "1.png.heatmap.png",
        "mask": "1.png.mask.png",
        "array": "1.png.array.npz",
    }
    assert "earlier" not in entry
    after = snapshot(tmp_path / "out")
    assert all(after[path] == before[path] for path in before if path.suffix == ".jpg")
    third = run([tmp_path / "in"], tmp_path / "out", save=("overlay", "heatmap", "mask", "array"))
    assert (third.written, third.skipped) == (0, 3)
    assert snapshot(tmp_path / "out") == after
    (tmp_path / "out" / "2.png.mask.png").unlink()
    assert run([tmp_path / "in"], tmp_path / "out", save=("overlay", "mask")).written == 1
    assert set(manifest(tmp_path / "out")["2.png"]["outputs"]) == {"overlay", "heatmap", "mask", "array"}
    run([tmp_path / "in"], tmp_path / "out", save=("mask",), style=Style(top=0.4))  # another fingerprint
    entry = manifest(tmp_path / "out")["1.png"]
    assert entry["outputs"] == {"mask": "1.png.mask.png"}
    assert set(entry["earlier"]) == {"1.png.overlay.jpg", "1.png.heatmap.png", "1.png.array.npz"}
