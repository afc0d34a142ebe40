"""Several processes share an export: every output is made exactly once, and there is one manifest."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from torch.distributed import HashStore

from tests.faults.conftest import free_port
from tests.overlays.folder.exports import contents, manifest, photos, run
from tests.refusals import refuses
from visionattn import signals
from visionattn.data.image_list import ImageRequest
from visionattn.errors import DataError
from visionattn.overlays.folder.image_export import ImageTask
from visionattn.overlays.folder.pipeline import OneProcess
from visionattn.overlays.folder.processes import Processes, gather

COUNTS = (1, 2, 3, 13, 17)
SHARED = """
import os, signal, sys, time
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
    leader = os.fork()  # OpenCV's threads do not survive a fork, so processes are forked before they use OpenCV
    if leader:
        assert os.waitpid(leader, 0)[1] == 0
        return
    store, children = store_of(0, True), []
    def method(model, images, target=None):
        if killed == os.getpid(): os.kill(os.getpid(), signal.SIGKILL)
        while killed and children and children[0].poll() is None: time.sleep(0.01)  # else the leader could do all
        return t.bright(model, images, target=target)
    method.__qualname__, method.__module__ = t.bright.__qualname__, t.bright.__module__
    replace = os.replace
    def replace_and_log(source, target):  # log the name of every finished overlay
        if ".overlay." in target:
            with open(f"{out}.log", "a") as log: log.write(os.path.basename(target) + "\\n")
        replace(source, target)
    os.replace = replace_and_log
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
        print(out.name, summary.written, summary.failed, *processes.lost, flush=True)
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
    """Run exports with several processes; return their folder, and the printed line of each export."""
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
def test_processes_make_every_output_exactly_once(shared, size, count):
    root, printed = shared
    out = root / f"{size}of{count}"
    bad = int(count > 12)  # 12.png is empty
    assert printed[out.name] == f"{count - bad} {bad}"  # the first process counts the images of all processes
    entries = manifest(out)  # checks that each image has one line
    assert set(entries) == {f"{number}.png" for number in range(count)}
    whole = contents(root / "whole")
    assert contents(out) == {name: whole[name] for name in whole if int(name.split(".")[0]) < count}
    times_made = Counter((root / f"{out.name}.log").read_text().split())
    assert set(times_made.values()) == {1}
    assert len(times_made) == count - bad
    assert {path.name for path in out.iterdir() if not path.name.endswith(".jpg")} == {"manifest.jsonl"}


def test_first_process_makes_the_outputs_that_a_killed_process_did_not_make(shared):
    root, printed = shared
    out = root / "killed"
    assert printed["killed"] == "16 1 process 1 ended with -9"
    assert contents(out) == contents(root / "whole")
    assert len(manifest(out)) == 17
    assert {path.name for path in out.iterdir() if not path.name.endswith(".jpg")} == {"manifest.jsonl"}
    assert run([root / "in"], out).skipped == 16


@pytest.mark.parametrize("joined", [True, False])
def test_first_process_makes_the_outputs_of_a_silent_process(joined, tmp_path, monkeypatch):
    """The helper takes a portion and then gives no sign of life, or it never joins."""
    monkeypatch.setattr("visionattn.overlays.folder.processes._SILENCE", 0.5)
    photos(tmp_path / "in", 7)
    store = HashStore()
    helper, leader = Processes(store, 1, 2), Processes(store, 0, 2)
    real, taken = leader.images, []

    def images():
        if joined and not taken:
            taken.append(next(helper.images()))
        return real()

    leader.images = images
    summary = run([tmp_path / "in"], tmp_path / "out", processes=leader)
    assert leader.lost == ["process 1 has given no sign of life for 0 s"]
    assert (summary.written, len(manifest(tmp_path / "out"))) == (7, 7)
    assert len(taken) == joined


def test_helper_ends_if_the_first_process_is_silent_while_it_looks_for_images(monkeypatch):
    monkeypatch.setattr("visionattn.overlays.folder.processes._BEAT", 0.02)
    monkeypatch.setattr("visionattn.overlays.folder.processes._SILENCE", 0.5)
    helper = Processes(HashStore(), 1, 2)
    with helper.alive():  # its own signs of life do not count
        refuses(DataError, "first process of this export has given no sign of life", lambda: list(helper.images()))


def helper_in_a_fork(pipe, **environment):
    """Fork a process that joins an export whose first process does not exist; return its pid."""
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.dup2(pipe[0], 0)
        os.close(pipe[1])
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
        os.environ.update({"RANK": "1", "WORLD_SIZE": "2", **address, **environment})
        with signals.watched(), gather(1, []):
            code = 0
    except SystemExit as ended:
        code = ended.code
    finally:
        os._exit(code)


@pytest.mark.parametrize("by", ["end of the parent", "SIGTERM"])
def test_helper_ends_before_it_has_joined(by):
    """A child of a killed process ends by itself, and SIGTERM ends every process that waits."""
    read, write = pipe = os.pipe()
    pid = helper_in_a_fork(pipe, **({"VISIONATTN_CHILD": "1"} if by == "end of the parent" else {}))
    try:
        time.sleep(0.5)
        assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        if by == "SIGTERM":
            os.kill(pid, signal.SIGTERM)
        else:
            os.close(write)
        code = exit_code(pid, seconds=10)
        assert code == 128 + signal.SIGTERM
    finally:
        os.close(read)
        if by == "SIGTERM":
            os.close(write)


def exit_code(pid, seconds):
    """Wait for a child and return its exit code; kill the child after some seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_helper_that_cannot_reach_the_first_process_says_where_it_tried(monkeypatch):
    monkeypatch.setattr("visionattn.overlays.folder.processes._JOIN", 0.1)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    port = str(free_port())
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    refuses(DataError, rf"cannot be reached at 127\.0\.0\.1, port {port}", gather(1, []).__enter__)


def test_one_process_does_all_the_work():
    processes = OneProcess()
    processes.lay_out([[ImageTask("a"), ImageTask("b")], [ImageTask("c")]])
    assert list(processes.images()) == [ImageTask("a"), ImageTask("b"), ImageTask("c")]
    assert processes.tally(done=1) == {"done": 1}
    assert processes.tally(done=2, failed=1) == {"done": 3, "failed": 1}
    processes.finish()
    assert list(processes.wait()) == []


def test_an_unreachable_first_process_raises_an_error_with_advice():
    class LostStore:
        def check(self, *key):
            raise RuntimeError("Connection reset by peer")

        add = set = get = check

    processes = Processes(LostStore(), 1, 2)
    refuses(DataError, "cannot be reached; run the command again", lambda: list(processes.images()))
    refuses(DataError, "cannot be reached", processes.finish)


def test_processes_of_another_launcher_are_joined(monkeypatch):
    port = free_port()
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name, value in {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RANK", "0")
    with gather(1, []) as leader:
        monkeypatch.setenv("RANK", "1")
        with gather(1, []) as helper:
            assert (leader.rank, helper.rank, helper.size) == (0, 1, 2)
            request = ImageRequest("dog", ((1.0, 2.0, 3.0, 4.0),), ("thing",))
            full_task = ImageTask(os.fsdecode(b"\xe9"), {"overlay": "x.overlay.jpg"}, {"mask": "x.mask.png"}, request)
            leader.lay_out([[ImageTask("a")], [ImageTask("b")], [full_task]])
            of_leader, of_helper = leader.images(), helper.images()
            assert [next(of_leader), next(of_helper), next(of_leader)] == [ImageTask("a"), ImageTask("b"), full_task]
            assert (list(of_leader), list(of_helper)) == ([], [])
            helper.tally(done=3)
            helper.finish("the disk is full")
            leader.tally(done=1)
            assert [sums["done"] for sums in leader.wait()] == [4]
            assert leader.trouble == "the disk is full"
