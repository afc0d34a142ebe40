"""Output files never replace foreign files, are never incomplete, and are on disk before they are renamed."""

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.overlays.folder.disks import disk_full_after
from tests.overlays.folder.exports import manifest, noise, photos, run, save
from visionattn.drawing.rendering import Style
from visionattn.errors import UsageError


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_a_foreign_file_is_never_overwritten(tmp_path, kind):
    photos(tmp_path / "in", 3)
    theirs = tmp_path / "out" / "1.png.overlay.jpg"
    theirs.parent.mkdir()
    (tmp_path / "precious").write_bytes(b"mine")
    {
        "file": lambda: theirs.write_bytes(b"mine"),
        "folder": theirs.mkdir,
        "link": lambda: theirs.symlink_to(tmp_path / "precious"),
    }[kind]()
    with pytest.raises(UsageError, match=r"1\.png\.overlay\.jpg exists, and .* choose another folder") as caught:
        run([tmp_path / "in"], tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path / "out") == ["1.png.overlay.jpg"]
    assert kind == "folder" or theirs.read_bytes() == b"mine"


def test_nothing_is_written_through_a_link_out_of_the_folder(tmp_path):
    photos(tmp_path / "in" / "a" / "b", 1)
    photos(tmp_path / "in", 1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").symlink_to(tmp_path / "elsewhere")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed) == (1, 1)
    assert "is a link that leads out of" in summary.failures[0][1]
    assert os.listdir(tmp_path / "elsewhere") == []


def test_a_file_in_the_place_of_a_folder_fails_its_images_alone(tmp_path):
    photos(tmp_path / "in" / "a", 2)
    photos(tmp_path / "in", 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"mine")
    summary = run([tmp_path / "in"], tmp_path / "out")
    assert (summary.written, summary.failed) == (1, 2)
    assert (tmp_path / "out" / "a").read_bytes() == b"mine"


def test_a_failed_encoding_leaves_no_incomplete_overlay(tmp_path, monkeypatch):
    photos(tmp_path / "in", 4)

    def half(self, file, *args, **options):
        (file.write if hasattr(file, "write") else Path(file).write_bytes)(b"\xff\xd8 half")
        raise OSError("encoder error -2")

    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", half)
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
    synced, named = {}, []
    fsync, replace = os.fsync, os.replace

    def syncing(handle):
        fsync(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def naming(source, target):
        promises = tmp_path / "out" / ".manifest.promised"
        promised = promises.read_bytes()[: synced[promises.stat().st_ino]]  # what a power cut would leave
        known = os.path.basename(target).encode() in promised
        named.append((synced[os.stat(source).st_ino] == os.stat(source).st_size, known, os.path.exists(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", syncing)

    monkeypatch.setattr(os, "replace", naming)
    run([tmp_path / "in"], tmp_path / "out")
    assert named == [(True, True, False)] * 5
