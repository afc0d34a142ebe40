"""Several processes share an export: no output is made twice or lost, and there is one manifest."""

import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.overlays.folder.exports import contents, manifest, photos, run
from tests.refusals import refuses
from visionattn.data.image_list import ImageRequest
from visionattn.errors import DataError
from visionattn.overlays.folder.image_export import ImageTask
from visionattn.overlays.folder.pipeline import OneProcess
from visionattn.overlays.folder.processes import Processes, gather

COUNTS = (1, 2, 3, 13, 17)
SHARED = """
import os, signal, sys
from pathlib import Path
from torch.distributed import TCPStore
import tests.overlays.folder.exports as t
from visionattn.errors import DataError
from visionattn.overlays.folder.processes import Processes

class Child:
    def __init__(self, pid): self.pid, self.returncode = pid, None
    def poll(self):
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid: self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

def store_of(port, hosts): return TCPStore("127.0.0.1", port, None, hosts, wait_for_workers=False)

def share(inputs, out, size, killed=None):
    leader = os.fork()  # OpenCV's threads do not survive a fork, so every process is forked before it works
    if leader:
        assert os.waitpid(leader, 0)[1] == 0
        return
    store = store_of(0, True)
    def method(model, images, target=None):
        if killed == os.getpid(): os.kill(os.getpid(), signal.SIGKILL)
        return t.bright(model, images, target=target)
    method.__qualname__, method.__module__ = t.bright.__qualname__, t.bright.__module__
    replace = os.replace
    def logged(source, target):  # who gave which file its name
        if ".overlay." in target:
            with open(f"{out}.log", "a") as log: log.write(os.path.basename(target) + "\\n")
        replace(source, target)
    os.replace = logged
    children = []
    for rank in range(1, size):
        pid = os.fork()
        if pid == 0:
            if killed == rank: killed = os.getpid()
            processes = Processes(store_of(store.port, False), rank, size)
            summary = t.run(inputs, out, batch_size=2, method=method, processes=processes)
            os._exit(summary.failed)
        children.append(Child(pid))
    try:
        processes = Processes(store, 0, size, children)
        summary = t.run(inputs, out, batch_size=2, method=method, processes=processes)
        print(out.name, summary.written, summary.failed, flush=True)
    except DataError as error:
        print(out.name, error, flush=True)
    for child in children:
        while child.poll() is None: pass
    os._exit(0)

root = Path(sys.argv[1])
for size in (2, 3):
    for count in map(int, sys.argv[2:]):
        share([root / "in" / f"{number}.png" for number in range(count)], root / f"{size}of{count}", size)
share([root / "in"], root / "killed", 2, killed=1)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("shared")
    photos(root / "in", 17)
    (root / "in" / "12.png").write_bytes(b"")
    run([root / "in"], root / "whole")
    process = subprocess.run(
        [sys.executable, "-c", SHARED, str(root), *map(str, COUNTS)],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return root, dict(line.split(" ", 1) for line in process.stdout.splitlines())


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("count", COUNTS)
def test_nothing_is_made_twice_and_nothing_is_lost(shared, size, count):
    root, told = shared
    out = root / f"{size}of{count}"
    bad = int(count > 12)
    assert told[out.name] == f"{count - bad} {bad}"  # the first process tells the sums of all
    entries = manifest(out)  # asserts that each image is there once
    assert set(entries) == {f"{number}.png" for number in range(count)}
    whole = contents(root / "whole")
    assert contents(out) == {name: whole[name] for name in whole if int(name.split(".")[0]) < count}
    made = Counter((root / f"{out.name}.log").read_text().split())
    assert set(made.values()) == {1}
    assert len(made) == count - bad
    assert {path.name for path in out.iterdir() if not path.name.endswith(".jpg")} == {"manifest.jsonl"}


def test_what_a_killed_process_left_is_made_by_the_next_run(shared):
    root, told = shared
    out = root / "killed"
    assert told["killed"].startswith("process 1 ended with -9; run the command again")
    noted = {entry["outputs"]["overlay"] for entry in manifest(out).values() if entry["status"] == "done"}
    assert noted == set(contents(out))  # the manifest knows all that was made
    missing = 16 - len(contents(out))
    assert 0 < missing <= 6  # what it had taken: a batch, and those read ahead
    summary = run([root / "in"], out, batch_size=2)
    assert (summary.written, summary.skipped, summary.failed) == (missing, 16 - missing, 1)
    assert contents(out) == contents(root / "whole")
    assert len(manifest(out)) == 17


def test_one_process_does_all_the_work():
    processes = OneProcess()
    processes.lay_out([[ImageTask("a"), ImageTask("b")], [ImageTask("c")]])
    assert list(processes.images()) == [ImageTask("a"), ImageTask("b"), ImageTask("c")]
    assert processes.tally(done=1) == {"done": 1}
    assert processes.tally(done=2, failed=1) == {"done": 3, "failed": 1}
    processes.finish()
    assert list(processes.wait()) == []


def test_an_unreachable_first_process_is_an_error_of_one_sentence():
    class Gone:
        def get(self, *key):
            raise RuntimeError("Connection reset by peer")

        add = set = get

    processes = Processes(Gone(), 1, 2)
    refuses(DataError, "cannot be reached; run the command again", lambda: list(processes.images()))
    refuses(DataError, "cannot be reached", processes.finish)


def test_processes_of_another_launcher_are_joined(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    with gather(1, []) as leader:
        monkeypatch.setenv("RANK", "1")
        with gather(1, []) as helper:
            assert (leader.rank, helper.rank, helper.size) == (0, 1, 2)
            request = ImageRequest("dog", ((1.0, 2.0, 3.0, 4.0),), ("thing",))
            odd = ImageTask(os.fsdecode(b"\xe9"), {"overlay": "x.overlay.jpg"}, {"mask": "x.mask.png"}, request)
            leader.lay_out([[ImageTask("a")], [ImageTask("b")], [odd]])
            one, other = leader.images(), helper.images()
            assert [next(one), next(other), next(one)] == [ImageTask("a"), ImageTask("b"), odd]
            assert (list(one), list(other)) == ([], [])
            helper.tally(done=3)
            helper.finish("it had to stop")
            leader.tally(done=1)
            assert [sums["done"] for sums in leader.wait()] == [4]
            assert leader.trouble == "it had to stop"
