"""Test exports that several processes share, if one of them is killed or stopped, also before it has joined."""

import json
import os
import signal
import socket
from pathlib import Path

import pytest

from tests.faults.conftest import _slurm, _torchrun, free_port
from tests.overlays.folder.exports import photos
from visionattn.files import LOCK

SLOW_CASES = ("die", 2), ("stop", 0)
IMAGES = 24
COMMAND = [
    "overlay",
    "--images",
    "in",
    "--out",
    "out",
    "--model",
    "test_vit",
    "--weights",
    "random",
    "--batch-size",
    "2",
]
SHORT_SILENCE = """
import visionattn.overlays.folder.processes as processes
processes._SILENCE, processes._BEAT = 2.0, 0.1
"""


def start_two(server, home, faults=("", ""), variables=_torchrun):
    """Start the processes of an export as a launcher does, with shorter times of silence."""
    photos(home / "in", IMAGES)
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        server.start(COMMAND, home, fault=SHORT_SILENCE + fault, env={**address, **variables(rank, 2)})
        for rank, fault in enumerate(faults)
    ]


def done(home: Path) -> list[str]:
    """Return the names of the finished images, each of which must have one line and all its outputs."""
    entries = [json.loads(line) for line in (home / "out" / "manifest.jsonl").read_bytes().splitlines()]
    assert all((home / "out" / name).is_file() for entry in entries for name in entry["outputs"].values())
    assert len({entry["source"] for entry in entries}) == len(entries)
    return sorted(os.path.basename(entry["source"]) for entry in entries if entry["status"] == "done")


def expected() -> list[str]:
    return sorted(f"{number}.png" for number in range(IMAGES))


def test_tasks_of_srun_share_one_export(server, tmp_path):
    log = tmp_path / "made"
    record = f"""
import os
from visionattn.overlays.folder.image_export import ExportJob
real = ExportJob.write
def write(self, image, explained):
    with open({str(log)!r}, "a") as file:
        file.write(os.path.basename(image.path) + "\\n")
    return real(self, image, explained)
ExportJob.write = write
"""
    for child in [child.wait() for child in start_two(server, tmp_path, (record, record), _slurm)]:
        assert child.code == 0, child.output
    assert done(tmp_path) == expected() == sorted(log.read_text().split())  # nothing was made twice


AT_BATCH = "from visionattn.overlays.folder.image_export import ExportJob\non_call(ExportJob, 'explain', {}, {})"


@pytest.mark.parametrize("act", ["die", "stop"])
def test_first_process_does_the_work_of_a_helper_that_is_killed_or_stopped(act, server, tmp_path):
    slow = AT_BATCH.format(1, "lambda: time.sleep(1)")  # so that the helper gets a part of the images
    leader, helper = start_two(server, tmp_path, ("import time\n" + slow, AT_BATCH.format(2, act)))
    ended = leader.wait(60)
    assert ended.code == 0, ended.output
    assert "the first process exported the images of the lost process" in ended.output
    assert done(tmp_path) == expected()
    helper.kill(signal.SIGKILL)
    assert helper.wait().code == -signal.SIGKILL
    assert {path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".manifest")} == set()


@pytest.mark.parametrize(
    ("act", "batch"), [("die", 0), ("stop", 2), *(pytest.param(*case, marks=pytest.mark.slow) for case in SLOW_CASES)]
)
def test_helper_ends_when_the_first_process_is_killed_or_stopped_and_the_next_run_makes_the_rest(
    act, batch, server, tmp_path
):
    """With batch 0, the fault happens before the first process has joined."""
    before = "import visionattn.overlays.folder.processes as p\non_call(p, '_take_cores', 1, {})\n"
    fault = AT_BATCH.format(batch, act) if batch else before.format(act)
    leader, helper = start_two(server, tmp_path, (fault, "processes._JOIN = 1.0"))
    ended = helper.wait(60)
    assert ended.code == 1, ended.output
    leader.kill(signal.SIGKILL)
    assert leader.wait().code == -signal.SIGKILL
    ended = server.run(COMMAND, tmp_path)
    assert ended.code == 0, ended.output
    assert done(tmp_path) == expected()
    assert not (tmp_path / "out" / LOCK).exists()


def test_helper_ends_if_the_first_process_is_stopped_while_the_helper_joins(server, tmp_path):
    """The system accepts connections to the port of a stopped process, which then never answers."""
    photos(tmp_path / "in", IMAGES)
    with socket.create_server(("127.0.0.1", 0)) as stopped:
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(stopped.getsockname()[1])}
        helper = server.start(COMMAND, tmp_path, fault=SHORT_SILENCE, env={**address, **_torchrun(1, 2)})
        ended = helper.wait(30)
    assert ended.code == 1, ended.output
    assert "the first process of this export has given no sign of life" in ended.output
