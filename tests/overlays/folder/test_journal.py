"""The complete lines of a journal that was cut at any byte are moved into the manifest."""

import json
import os
from pathlib import Path

from tests.refusals import refuses
from visionattn.errors import DataError
from visionattn.overlays.folder.journal import Journal
from visionattn.overlays.folder.manifest import Manifest, entry_from_dict


def done(source):
    return {
        "source": source, "bytes": 1, "modified": 1, "fingerprint": "r", "status": "done",
        "outputs": {"overlay": f"{os.path.basename(source)}.overlay.jpg"},
    }  # fmt: skip


def test_all_complete_lines_of_a_cut_journal_are_moved_into_the_manifest(tmp_path):
    journal = Journal(str(tmp_path), 3)
    for name in ("a.jpg", "b.jpg"):
        journal.promise([(f"{name}.overlay.jpg", f"/in/{name}")], "r")
        journal.add(entry_from_dict(done(f"/in/{name}")))
        (tmp_path / f"{name}.overlay.jpg").touch()
    journal.close()
    whole = Path(journal.path).read_bytes()
    for cut in range(len(whole) + 1):
        (tmp_path / "manifest.jsonl").unlink(missing_ok=True)
        Path(journal.path).write_bytes(whole[:cut])
        lines = [json.loads(line) for line in whole[:cut].split(b"\n")[:-1]]
        manifest = Manifest(str(tmp_path))
        assert [entry.to_dict() for entry in manifest.take_in()] == [line for line in lines if isinstance(line, dict)]
        assert not Path(journal.path).exists()
        manifest.close()
        again = Manifest(str(tmp_path))
        assert list(again.done) == [line["source"] for line in lines if isinstance(line, dict)]
        assert set(again.owners) == {line[0] for line in lines if isinstance(line, list)}  # the promised outputs
        assert again.take_in() == []
        again.close()


def test_helper_writes_nothing_after_its_journal_was_moved_into_the_manifest(tmp_path):
    """The first process has stopped waiting for this helper, or was killed, and another run has begun."""
    journal = Journal(str(tmp_path), 1)
    journal.promise([("a.jpg.overlay.jpg", "/in/a.jpg")], "r")
    manifest = Manifest(str(tmp_path))
    manifest.take_in()
    manifest.close()
    for act in (journal.secure, lambda: journal.add(entry_from_dict(done("/in/a.jpg"))), journal.close):
        refuses(DataError, r"journal\.1 was changed by another process", act)
    assert not Path(journal.path).exists()
