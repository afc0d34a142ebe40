"""Numbers of runs, and their locks."""

import subprocess
import sys

from visionattn.training import run_folders


def test_a_run_gets_the_next_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("0", "9", "10", "old", "2.5"):
        (tmp_path / "runs" / "mine" / name).mkdir(parents=True)
    assert [path.name for path in run_folders._versions("mine")] == ["0", "9", "10"]
    assert run_folders._new_run("mine").name == "11"
    assert run_folders._new_run("mine").name == "12"
    assert run_folders._new_run("another").name == "0"
    assert (tmp_path / "runs" / "another" / "0").is_dir()


def test_other_processes_of_a_run_use_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    run_folders._new_run("mine")
    monkeypatch.setenv("VISIONATTN_RUN", "runs/mine/4")
    assert run_folders._new_run("mine").as_posix() == "runs/mine/4"
    assert list(tmp_path.iterdir()) == []


LOCK = """
import sys
from pathlib import Path
from visionattn.errors import UsageError
from visionattn.training.run_folders import _lock
try:
    _lock(Path(sys.argv[1]))
    print("held", flush=True)
    input()
except UsageError as error:
    print(error)
"""


def test_a_locked_run_is_refused_until_its_process_ends(tmp_path):
    command = [sys.executable, "-c", LOCK, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == "held\n"
        second = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=60, check=True)
        assert second.stdout.startswith(f"{tmp_path} is being trained by another process")
        first.communicate("\n")
    third = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=60, check=True)
    assert third.stdout == "held\n"
