"""Test the numbers of runs, and the locks of their folders."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.refusals import refuses
from visionattn.errors import UsageError
from visionattn.training import run_folders


def test_new_run_gets_the_next_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("0", "9", "10", "old", "2.5"):
        (tmp_path / "runs" / "mine" / name).mkdir(parents=True)
    assert [path.name for path in run_folders._versions("mine")] == ["0", "9", "10"]
    assert run_folders._new_run("mine").name == "11"
    assert run_folders._new_run("mine").name == "12"
    assert run_folders._new_run("another").name == "0"
    assert (tmp_path / "runs" / "another" / "0").is_dir()


def test_other_processes_of_a_run_create_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    run_folders._new_run("mine")
    monkeypatch.setenv("VISIONATTN_RUN", "runs/mine/4")
    assert run_folders._new_run("mine").as_posix() == "runs/mine/4"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["..", "../escape", "/tmp/escape", "mine/0", "..\\escape", "a\0b", "é" * 128])
def test_name_that_is_not_one_folder_in_runs_is_refused(name):
    refuses(UsageError, "--name must be the name of one folder in runs/", run_folders._check_name, name)
    run_folders._check_name("..mine")


@pytest.mark.parametrize("before", [None, "runs/mine/4"])
def test_later_run_of_a_process_does_not_get_the_folder_of_the_earlier_run(before, tmp_path, monkeypatch):
    if before:
        monkeypatch.setenv("VISIONATTN_RUN", before)  # as in a process that another process of the run has started
    with run_folders._released():
        os.environ["VISIONATTN_RUN"] = str(tmp_path)
        run_folders._lock(tmp_path)
    assert os.environ.get("VISIONATTN_RUN") == before
    assert not run_folders._HELD


# lock a run, print "held", and keep the lock until a line is read; or print the error
LOCK = """
import gc, sys, warnings
from pathlib import Path
from visionattn.errors import UsageError
from visionattn.training.run_folders import _lock, _released
warnings.simplefilter("error", ResourceWarning)
sys.unraisablehook = print
with _released():
    try:
        _lock(Path(sys.argv[1]))
        print("held", flush=True)
        input()
    except UsageError as error:
        print(error)
gc.collect()
"""


def test_run_is_locked_until_its_process_ends(tmp_path):
    command = [sys.executable, "-c", LOCK, str(tmp_path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as first:
        assert first.stdout.readline() == "held\n"
        second = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=60, check=True)
        assert second.stdout.startswith(f"{tmp_path} is being trained by another process")
        assert len(second.stdout.splitlines()) == 1  # no ResourceWarning: the lock's file is closed
        first.communicate("\n")
    third = subprocess.run(command, input="\n", capture_output=True, text=True, timeout=60, check=True)
    assert third.stdout == "held\n"


def test_temporary_files_of_killed_trainings_are_removed_unless_a_process_writes_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for number, files in {"0": [".lock", "last.ckpt"], "1": [".lock"], "2": ["test.csv"]}.items():
        (tmp_path / "runs" / "mine" / number).mkdir(parents=True)
        for name in [*files, ".part.last.ckpt"]:
            (tmp_path / "runs" / "mine" / number / name).write_text(name)
    command = [sys.executable, "-c", LOCK, "runs/mine/1"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as training:
        assert training.stdout.readline() == "held\n"
        run_folders._remove_unfinished_files("mine")
        training.communicate("\n")
    left = sorted(str(path.relative_to("runs/mine")) for path in Path("runs").rglob("*.*"))
    # a training writes into 1, and 2 is not of a training
    assert left == ["0/.lock", "0/last.ckpt", "1/.lock", "1/.part.last.ckpt", "2/.part.last.ckpt", "2/test.csv"]
    run_folders._remove_unfinished_files("mine")
    assert not Path("runs/mine/1/.part.last.ckpt").exists()
