"""Journals that were cut at any byte are moved into the manifest."""

import json
import os
from pathlib import Path

from visionattn.overlays.folder.journal import Journal
from visionattn.overlays.folder.manifest import Manifest, entry_from_dict


def done(source):
    return {
        "source": source, "bytes": 1, "modified": 1, "fingerprint": "r", "status": "done",
        "outputs": {"overlay": f"{os.path.basename(source)}.overlay.jpg"},
    }  # fmt: skip


def test_journals_are_taken_in_wherever_they_were_cut(tmp_path):
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
        taken = Manifest(str(tmp_path))
        assert [entry.to_dict() for entry in taken.take_in()] == [line for line in lines if isinstance(line, dict)]
        assert not Path(journal.path).exists()
        taken.close()
        again = Manifest(str(tmp_path))
        assert list(again.done) == [line["source"] for line in lines if isinstance(line, dict)]
        assert set(again.owners) == {line[0] for line in lines if isinstance(line, list)}  # known for ours
        assert again.take_in() == []
        again.close()
