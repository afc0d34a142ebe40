"""The manifest stays correct if it is cut at any byte or the disk is full, and refuses foreign files."""

import json
import os
from contextlib import suppress

import pytest

from tests.overlays.folder.disks import disk_full_after
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.overlays.folder.manifest import NAME, Manifest, entry_from_dict

NOT_TEXT = os.fsdecode(b"/in/caf\xe9.jpg")


def done(source, *, output=None, fingerprint="r1", size=10, modified=1):
    outputs = {"overlay": output or os.path.basename(source) + ".overlay.jpg"}
    return {
        "source": source, "bytes": size, "modified": modified, "fingerprint": fingerprint,
        "status": "done", "outputs": outputs
    }  # fmt: skip


def failed(source, reason="is empty", *, fingerprint="r1", size=0, modified=1):
    return {
        "source": source, "bytes": size, "modified": modified, "fingerprint": fingerprint,
        "status": "failed", "reason": reason
    }  # fmt: skip


def write(folder, *entries, promise=True):
    """Do what a run does for each image: promise its outputs, write them, and add its line."""
    manifest = Manifest(str(folder))
    for entry in entries:
        for output in entry.get("outputs", {}).values() if promise else ():
            manifest.promise([(output, entry["source"])], entry["fingerprint"])
            (folder / output).touch()
        manifest.add(entry_from_dict(entry))
    manifest.close()


def lines(folder):
    return [json.loads(line) for line in (folder / NAME).read_bytes().split(b"\n") if line]


def test_added_entries_are_read_again(tmp_path):
    entries = [done("/in/ảnh\n.jpg"), failed("/in/b.jpg"), done(NOT_TEXT, output="odd.jpg"), failed("/in/\u2028.png")]
    write(tmp_path, *entries)
    assert lines(tmp_path) == entries
    assert os.fsencode(lines(tmp_path)[2]["source"]) == b"/in/caf\xe9.jpg"
    manifest = Manifest(str(tmp_path))
    assert list(manifest.done) == ["/in/ảnh\n.jpg", NOT_TEXT]
    kept = manifest.done[NOT_TEXT]
    assert (kept.outputs, kept.fingerprint, kept.stamp) == ({"overlay": "odd.jpg"}, "r1", (10, 1))
    assert manifest.owners == {"ảnh\n.jpg.overlay.jpg": "/in/ảnh\n.jpg", "odd.jpg": NOT_TEXT}
    assert sorted(os.listdir(tmp_path)) == sorted([NAME, "odd.jpg", "ảnh\n.jpg.overlay.jpg"])


def test_only_the_last_line_of_every_image_is_kept(tmp_path):
    write(tmp_path, done("/in/a.jpg"), failed("/in/b.jpg"), done("/in/c.jpg"))
    write(tmp_path, done("/in/a.jpg", fingerprint="r2"), done("/in/b.jpg"))
    assert lines(tmp_path) == [done("/in/c.jpg"), done("/in/a.jpg", fingerprint="r2"), done("/in/b.jpg")]


def test_outputs_that_were_not_replaced_are_listed_as_earlier(tmp_path):
    write(tmp_path, done("/in/a.jpg"))
    write(tmp_path, done("/in/a.jpg", output="a.jpg.overlay.png"))
    assert lines(tmp_path)[0]["earlier"] == ["a.jpg.overlay.jpg"]
    write(tmp_path, failed("/in/a.jpg"))
    assert sorted(lines(tmp_path)[0]["earlier"]) == ["a.jpg.overlay.jpg", "a.jpg.overlay.png"]
    manifest = Manifest(str(tmp_path))
    assert set(manifest.owners.values()) == {"/in/a.jpg"}
    assert not manifest.done
    (tmp_path / "a.jpg.overlay.jpg").unlink()
    write(tmp_path, done("/in/a.jpg", output="a.jpg.overlay.png"))
    assert "earlier" not in lines(tmp_path)[0]


def test_a_failure_is_written_again_only_if_it_differs(tmp_path):
    write(tmp_path, failed("/in/a.jpg"))
    before = (tmp_path / NAME).stat().st_mtime_ns, os.stat(tmp_path).st_mtime_ns
    write(tmp_path, failed("/in/a.jpg"))
    assert before == ((tmp_path / NAME).stat().st_mtime_ns, os.stat(tmp_path).st_mtime_ns)
    for change in ({"reason": "damaged"}, {"fingerprint": "r2"}, {"size": 5}, {"modified": 2}):
        write(tmp_path, failed("/in/a.jpg", **change))
        assert lines(tmp_path) == [failed("/in/a.jpg", **change)]


def test_a_run_without_entries_creates_no_folder(tmp_path):
    Manifest(str(tmp_path / "out")).close()
    manifest = Manifest(str(tmp_path / "out"))
    manifest.promise([], "r1")
    manifest.close()
    assert not (tmp_path / "out").exists()


def test_a_manifest_that_was_cut_at_any_byte_is_continued(tmp_path):
    entries = [done("/in/a.jpg"), failed("/in/b.jpg"), done(NOT_TEXT, output="odd.jpg")]
    write(tmp_path, *entries)
    whole = (tmp_path / NAME).read_bytes()
    promises = b"".join(
        json.dumps([entry["outputs"]["overlay"], entry["source"], "r1"]).encode() + b"\n" for entry in entries[::2]
    )
    for cut in range(len(whole)):
        (tmp_path / NAME).write_bytes(whole[:cut])
        (tmp_path / ".manifest.promised").write_bytes(promises)
        manifest = Manifest(str(tmp_path))
        assert set(manifest.owners) == {"a.jpg.overlay.jpg", "odd.jpg"}  # every output is recognised
        known = whole[:cut].count(b"\n") + (whole[cut : cut + 1] == b"\n")
        assert list(manifest.done) == [entry["source"] for entry in entries[:known] if entry["status"] == "done"]
        for entry in entries[known:]:
            manifest.add(entry_from_dict(entry))
        manifest.close()
        if known < len(entries):
            assert (tmp_path / NAME).read_bytes() == whole
            assert not (tmp_path / ".manifest.promised").exists()


def test_a_file_of_promises_that_was_cut_at_any_byte_is_continued(tmp_path):
    promises = b'["a.jpg.overlay.jpg", "/in/a.jpg", "r1"]\n["b.jpg.overlay.jpg", "/in/b.jpg", "r1"]\n'
    for cut in range(len(promises)):
        (tmp_path / ".manifest.promised").write_bytes(promises[:cut])
        manifest = Manifest(str(tmp_path))  # a run that continues a killed run and is killed too
        assert len(manifest.owners) == promises[:cut].count(b"\n")
        manifest.promise([("c.jpg.overlay.jpg", "/in/c.jpg")], "r1")
        assert Manifest(str(tmp_path)).owners == {**manifest.owners, "c.jpg.overlay.jpg": "/in/c.jpg"}
        manifest.close()


def test_a_cut_manifest_stays_readable_after_a_run_that_promises_and_adds_nothing(tmp_path):
    write(tmp_path, done("/in/a.jpg"))
    line = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(line + line + line[:20])  # a stale line and an incomplete line
    manifest = Manifest(str(tmp_path))
    manifest.promise([("b.jpg.overlay.jpg", "/in/b.jpg")], "r1")
    manifest.close()
    assert lines(tmp_path) == [done("/in/a.jpg")]


def test_an_output_without_a_line_keeps_its_promise(tmp_path):
    manifest = Manifest(str(tmp_path))
    manifest.promise([("a.jpg.overlay.jpg", "/in/a.jpg"), ("b.jpg.overlay.jpg", "/in/b.jpg")], "r1")
    (tmp_path / "a.jpg.overlay.jpg").touch()
    manifest.close()
    assert Manifest(str(tmp_path)).owners == {"a.jpg.overlay.jpg": "/in/a.jpg"}


def test_an_output_that_a_killed_run_may_have_replaced_loses_its_fingerprint(tmp_path):
    write(tmp_path, done("/in/a.jpg", fingerprint="r1"), done("/in/b.jpg", fingerprint="r1"))
    killed = Manifest(str(tmp_path))
    killed.promise([("a.jpg.overlay.jpg", "/in/a.jpg")], "r2")
    again = Manifest(str(tmp_path))
    assert again.done["/in/a.jpg"].fingerprint not in ("r1", "r2")
    assert again.done["/in/a.jpg"].outputs == {"overlay": "a.jpg.overlay.jpg"}  # the name of the output stays
    assert again.done["/in/b.jpg"].fingerprint == "r1"
    again.promise([("c.jpg.overlay.jpg", "/in/c.jpg")], "r1")
    again.close()  # the run ended before it made the output again
    assert Manifest(str(tmp_path)).done["/in/a.jpg"].fingerprint not in ("r1", "r2")
    last = Manifest(str(tmp_path))
    last.add(entry_from_dict(done("/in/a.jpg", fingerprint="r2")))
    assert Manifest(str(tmp_path)).done["/in/a.jpg"].fingerprint == "r2"
    last.close()
    with pytest.raises(DataError, match="promised was changed by another process"):
        killed.close()


@pytest.mark.parametrize(
    "content",
    [
        b"{}\n",
        b"[1]\n",
        b"hello\n",
        b'{"source": 3, "status": "done"}\n',
        b'{"source": "x", "status": "done"}\n',
        b"\xff\xfe\n",
        b'{"a": 1}',
    ],
)
def test_a_foreign_manifest_is_refused_and_left_unchanged(tmp_path, content):
    (tmp_path / NAME).write_bytes(content)
    refuses(UsageError, r"manifest\.jsonl was not written by visionattn", lambda: Manifest(str(tmp_path)))
    assert (tmp_path / NAME).read_bytes() == content


def test_a_manifest_damaged_in_its_middle_is_refused(tmp_path):
    write(tmp_path, done("/in/a.jpg"), done("/in/b.jpg"), done("/in/c.jpg"))
    whole = (tmp_path / NAME).read_bytes()
    (tmp_path / NAME).write_bytes(whole.replace(b"b.jpg", b'b"jpg', 1))
    refuses(UsageError, "was not written by visionattn", lambda: Manifest(str(tmp_path)))


def test_an_output_folder_that_is_a_file_or_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    refuses(UsageError, "file is a file; name a folder", lambda: Manifest(str(tmp_path / "file")))
    refuses(DataError, "Not a directory", lambda: Manifest(str(tmp_path / "file" / "out")))


@pytest.mark.parametrize("size", [0, 30, 130, 300, 500])
def test_a_full_disk_raises_a_one_line_error_and_the_next_run_continues(tmp_path, size):
    write(tmp_path, done("/in/first.jpg"))
    entries = [done(f"/in/{number}.jpg") for number in range(5)]
    manifest = Manifest(str(tmp_path))

    def promise_and_add():
        for entry in entries:
            manifest.promise([(entry["outputs"]["overlay"], entry["source"])], "r1")
            (tmp_path / entry["outputs"]["overlay"]).touch()
            manifest.add(entry_from_dict(entry))

    with disk_full_after(size):
        with pytest.raises(DataError, match=r"manifest\.\w+ cannot be written: File too large") as caught:
            promise_and_add()
        with suppress(DataError):  # closing may fail too, but only with this error
            manifest.close()
    assert "\n" not in str(caught.value)
    manifest = Manifest(str(tmp_path))
    assert "/in/first.jpg" in manifest.done
    assert {path.name for path in tmp_path.glob("*.overlay.jpg")} <= set(manifest.owners)
    write(tmp_path, *entries)
    assert lines(tmp_path) == [done("/in/first.jpg"), *entries]
    assert not [name for name in os.listdir(tmp_path) if name.startswith(".part.")]


def test_an_incomplete_line_is_removed_when_the_disk_is_full(tmp_path):
    manifest = Manifest(str(tmp_path))
    manifest.add(entry_from_dict(done("/in/a.jpg")))
    with disk_full_after((tmp_path / NAME).stat().st_size + 20), pytest.raises(DataError):
        manifest.add(entry_from_dict(done("/in/b.jpg")))
    manifest.add(entry_from_dict(done("/in/c.jpg")))
    manifest.close()
    assert lines(tmp_path) == [done("/in/a.jpg"), done("/in/c.jpg")]


def test_lines_that_another_process_has_written_are_kept(tmp_path):
    """Two manifests of one folder are open at once, as can happen on a file system without locks."""
    write(tmp_path, done("/in/first.jpg"))
    (tmp_path / "manifest.jsonl").write_bytes((tmp_path / "manifest.jsonl").read_bytes() + b'{"source": "/in/cut')
    (tmp_path / ".manifest.promised").touch()
    one, two = Manifest(str(tmp_path)), Manifest(str(tmp_path))
    for number in range(3):
        one.add(entry_from_dict(done(f"/in/{number}.jpg")))
    for _ in range(2):
        with pytest.raises(DataError, match=r"manifest\.jsonl was changed by another process"):
            two.add(entry_from_dict(done("/in/other.jpg")))
    with pytest.raises(DataError, match=r"manifest\.jsonl was changed by another process"):
        two.close()
    one.add(entry_from_dict(done("/in/3.jpg")))
    one.close()
    assert lines(tmp_path) == [done("/in/first.jpg"), *(done(f"/in/{number}.jpg") for number in range(4))]


def test_lines_are_not_added_to_a_manifest_that_another_process_has_replaced(tmp_path):
    write(tmp_path, done("/in/first.jpg"))
    manifest = Manifest(str(tmp_path))
    manifest.add(entry_from_dict(done("/in/0.jpg")))
    (tmp_path / "other").write_bytes((tmp_path / "manifest.jsonl").read_bytes())
    (tmp_path / "other").replace(tmp_path / "manifest.jsonl")
    with pytest.raises(DataError, match="was changed by another process"):
        manifest.add(entry_from_dict(done("/in/1.jpg")))
    with pytest.raises(DataError, match="was changed by another process"):
        manifest.close()
    assert lines(tmp_path) == [done("/in/first.jpg"), done("/in/0.jpg")]
