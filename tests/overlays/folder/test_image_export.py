"""Outputs never replace foreign files, are never incomplete, and are on disk before they are renamed."""

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.overlays.folder.disks import disk_full_after
from tests.overlays.folder.exports import Tiny, manifest, noise, photos, run, save
from visionattn.data.placement import Preprocess
from visionattn.drawing import Style
from visionattn.errors import UsageError
from visionattn.maps.methods.cam import GradCAM
from visionattn.overlays.explainer import Explainer


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_foreign_file_is_never_overwritten(tmp_path, kind):
    photos(tmp_path / "in", 3)
    foreign = tmp_path / "out" / "1.png.overlay.jpg"
    foreign.parent.mkdir()
    (tmp_path / "precious").write_bytes(b"mine")
    {
        "file": lambda: foreign.write_bytes(b"mine"),
        "folder": foreign.mkdir,
        "link": lambda: foreign.symlink_to(tmp_path / "precious"),
    }[kind]()
    with pytest.raises(UsageError, match=r"1\.png\.overlay\.jpg exists, and .* choose another folder") as caught:
        run([tmp_path / "in"], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "out") == ["1.png.overlay.jpg"]
    assert kind == "folder" or foreign.read_bytes() == b"mine"


def test_nothing_is_written_through_a_link_that_leads_out_of_the_output_folder(tmp_path):
    photos(tmp_path / "in" / "a" / "b", 1)
    photos(tmp_path / "in", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed) == (1, 1)
    assert "is a link that leads out of" in summary.failures[0][1]
    assert os.listdir(tmp_path / "elsewhere") == []


def test_only_images_whose_output_folder_is_a_file_fail(tmp_path):
    photos(tmp_path / "in" / "a", 2)
    photos(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"mine")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed) == (1, 2)
    assert (tmp_path / "out" / "a").read_bytes() == b"mine"


def test_a_failed_encoding_leaves_no_incomplete_overlay(tmp_path, monkeypatch):
    photos(tmp_path / "in", 4)

    def write_half(self, file, *args, **options):
        (file.write if hasattr(file, "write") else Path(file).write_bytes)(b"\xff\xd8 half")
        raise OSError("encoder error -2")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", write_half)
        summary = run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".png"))
    assert (summary.written, summary.failed) == (0, 4)
    assert "encoder error -2" in manifest(tmp_path / "out")["0.png"]["reason"]
    assert os.listdir(tmp_path / "out") == ["manifest.jsonl"]
    assert run([tmp_path / "in"], tmp_path / "out").written == 4


def test_an_overlay_that_does_not_fit_the_disk_fails_and_the_others_are_written(tmp_path):
    photos(tmp_path / "in", 3)
    save(tmp_path / "in" / "large.png", noise(300, 300))
    with disk_full_after(8192):
        summary = run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".png"))
    assert (summary.written, summary.failed) == (3, 1)
    assert manifest(tmp_path / "out")["large.png"]["reason"].endswith("cannot be written: File too large")
    assert sorted(os.listdir(tmp_path / "out")) == [*(f"{n}.png.overlay.png" for n in range(3)), "manifest.jsonl"]
    assert run([tmp_path / "in"], tmp_path / "out", style=Style(suffix=".png")).written == 1


def test_files_are_on_disk_before_they_are_renamed(tmp_path, monkeypatch):
    photos(tmp_path / "in", 5)
    synced, replaced = {}, []  # inode → bytes on disk; for each renamed file what `note_replace` found
    fsync, replace = os.fsync, os.replace

    def note_sync(handle):
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def note_replace(source, target):
        promises = tmp_path / "out" / ".manifest.promised"
        promised = promises.read_bytes()[: synced[promises.stat().st_ino]]  # the part that would survive a power cut
        is_promised = os.path.basename(target).encode() in promised
        is_synced = synced[os.stat(source).st_ino] == os.stat(source).st_size
        replaced.append((is_synced, is_promised, os.path.exists(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", note_sync)
    monkeypatch.setattr(os, "replace", note_replace)
    run([tmp_path / "in"], tmp_path / "out")
    assert replaced == [(True, True, False)] * 5


def test_a_number_that_is_another_class_in_another_model_is_refused(tmp_path):
    """The list asks for class 0 of two models, whose classes have another order."""
    photos(tmp_path / "in", 2)
    first, second = sorted((tmp_path / "in").iterdir())
    (tmp_path / "list.csv").write_text(f"path,target\nin/{first.name},0\nin/{second.name},dog\n")
    explainers = [
        Explainer(Tiny(), Preprocess(16), GradCAM("conv"), names, name=" ".join(names))
        for names in (("cat", "dog", "eel"), ("eel", "dog", "cat"))
    ]
    options = {"explainers": explainers, "compare": True}
    summary = run([tmp_path / "list.csv"], tmp_path / "out", **options)
    assert (summary.written, summary.failed) == (1, 1)
    assert summary.failures[0][1] == (
        "the target 0 is 'cat' in one model and 'eel' in another; give the name of the class"
    )
    with pytest.raises(UsageError, match="the target 2 is 'eel' in one model and 'cat' in another"):
        run([second], tmp_path / "out", target=2, **options)
