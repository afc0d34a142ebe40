"""One export at a time writes into a folder, and a second one names the holder of the lock."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from tests.overlays.folder.exports import bright, contents, manifest, photos, run, snapshot
from tests.refusals import refuses
from visionattn.errors import DataError, UsageError
from visionattn.files import LOCK, FolderLock

HOLD = """
import sys, time
from visionattn.files import FolderLock
with FolderLock(sys.argv[1]):
    print("locked", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def held(tmp_path):
    """A folder that another process has locked, and that process."""
    folder = tmp_path / "out"
    root = Path(__file__).parents[1]
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "locked\n"
    yield folder, process
    process.kill()
    process.wait()
    process.stdout.close()


def test_lock_of_another_process_is_refused_with_its_name_until_that_process_is_killed(held):
    folder, process = held
    for _ in range(2):  # a refused process leaves the lock as it was
        refuses(
            UsageError,
            rf"out is being written by process {process.pid} on .+ since 20",
            FolderLock(str(folder)).__enter__,
        )
    process.send_signal(signal.SIGKILL)
    process.wait()
    with FolderLock(str(folder)):
        assert json.loads((folder / LOCK).read_text())["process"] == os.getpid()
    assert list(folder.iterdir()) == []


def test_second_of_two_exports_at_once_is_refused_and_the_first_one_lists_every_output(tmp_path):
    photos(tmp_path / "in", 7)
    out = tmp_path / "out"
    refused = []

    def explain_and_export_again(*args, **kwargs):
        if not refused:
            with pytest.raises(UsageError, match=f"being written by process {os.getpid()} "):
                run([tmp_path / "in"], out)
            refused.append(1)
        return bright(*args, **kwargs)

    summary = run([tmp_path / "in"], out, method=explain_and_export_again)
    assert refused
    assert summary.written == len(manifest(out)) == len(contents(out)) == 7
    assert not (out / LOCK).exists()
    assert run([tmp_path / "in"], out, method=explain_and_export_again).skipped == 7


def test_exports_that_start_together_never_write_at_once(tmp_path):
    """Threads take and release the lock of one folder; each release removes the file, and the folder too."""
    inside, most, turns = [], [], []

    def take_turns():
        for _ in range(50):
            try:
                with FolderLock(str(tmp_path / "a" / "out")):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
                turns.append(1)
            except UsageError:
                continue

    threads = [threading.Thread(target=take_turns) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}
    assert turns


def test_folder_that_another_export_removes_meanwhile_is_made_again(tmp_path, monkeypatch):
    make, removed = os.makedirs, []

    def remove_and_make(path, *args, **options):
        if len(removed) < 3:
            removed.append(path)
            raise FileNotFoundError(2, "No such file or directory", path)
        make(path, *args, **options)

    monkeypatch.setattr(os, "makedirs", remove_and_make)
    with FolderLock(str(tmp_path / "a" / "out")):
        assert (tmp_path / "a" / "out" / LOCK).exists()
    assert not (tmp_path / "a").exists()


def test_folder_below_a_link_to_nothing_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "nothing")
    refuses(DataError, "out cannot be made", lambda: FolderLock(str(tmp_path / "link" / "out")).__enter__())


def test_export_with_nothing_to_do_works_in_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    plain = os.open

    def refuse_lock(path, *args, **options):  # root could write in spite of the folder's mode
        if str(path).endswith(LOCK):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, *args, **options)

    photos(tmp_path / "in", 2)
    run([tmp_path / "in"], tmp_path / "out")
    before = snapshot(tmp_path / "out")
    (tmp_path / "out").chmod(0o500)
    monkeypatch.setattr(os, "open", refuse_lock)
    assert run([tmp_path / "in"], tmp_path / "out").skipped == 2
    assert snapshot(tmp_path / "out") == before


def test_refused_export_leaves_no_folder(tmp_path):
    photos(tmp_path / "in", 1)
    with pytest.raises(UsageError, match="there is no"):
        run([tmp_path / "nothing"], tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


def test_a_lock_that_is_a_link_changes_no_other_file(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "own.txt").write_text("mine")
    (tmp_path / "out" / LOCK).symlink_to(tmp_path / "own.txt")
    with FolderLock(str(tmp_path / "out")):
        pass
    assert (tmp_path / "own.txt").read_text() == "mine"
