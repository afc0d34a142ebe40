"""Test that files stay complete after kills, on a full disk, and in unwritable folders."""

import csv
import errno
import json
import os
import random
import resource
import signal
import stat
import time

import numpy as np
import pytest
import torch

from tests.faults.conftest import write_config
from visionattn.data import read_image, write_image
from visionattn.errors import DataError
from visionattn.overlays.folder.manifest import Failed, Manifest
from visionattn.training.callbacks.metrics_file import MetricsFile
from visionattn.training.callbacks.report import _write_csv
from visionattn.training.checkpoint_io import DurableCheckpointIO

OTHER_DISK = "/dev/shm"  # on Linux, a file system that is not the one of tmp_path


def checkpoint(number):
    """Return a checkpoint all of whose numbers are `number`, so that a mixture of two checkpoints is detected."""
    return {"number": number, "state_dict": {"weight": torch.full((100_000,), float(number))}}


def in_child(act):
    """Run `act` in a forked process that exits with 0, or with 1 after a DataError; return its pid."""
    pid = os.fork()
    if pid == 0:
        code = 3
        try:
            act()
            code = 0
        except DataError:
            code = 1
        finally:
            os._exit(code)
    return pid


def code_of(pid):
    """Wait for a process and return its exit code, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_checkpoint_can_be_loaded_after_kills_during_saves(kills, tmp_path, monkeypatch):
    delays = random.Random(0)
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint(checkpoint(0), path)
    reached = 0
    for kill in range(kills):
        if kill % 2 and os.path.isdir(OTHER_DISK):  # the folder for temporary files must not matter
            monkeypatch.setenv("TMPDIR", OTHER_DISK)
        else:
            monkeypatch.delenv("TMPDIR", raising=False)

        def save_repeatedly(start=reached):
            for number in range(start + 1, start + 10_000):
                DurableCheckpointIO().save_checkpoint(checkpoint(number), path)

        pid = in_child(save_repeatedly)
        time.sleep(delays.uniform(0.001, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert code_of(pid) == -signal.SIGKILL
        content = torch.load(path, weights_only=True)
        assert content["number"] >= reached  # the earlier checkpoint or a later checkpoint
        assert (content["state_dict"]["weight"] == content["number"]).all()
        reached = content["number"]
        assert set(os.listdir(tmp_path)) <= {"last.ckpt", ".part.last.ckpt"}  # at most one temporary file
    assert reached > 0
    DurableCheckpointIO().save_checkpoint(checkpoint(-1), path)
    assert os.listdir(tmp_path) == ["last.ckpt"]  # the next save has replaced the temporary file


def picture(number):
    """Return random pixels."""
    return np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)


class Writers:
    """Functions that write a kind of file into a folder; `number` determines the content."""

    @staticmethod
    def checkpoint(folder, number):
        DurableCheckpointIO().save_checkpoint(checkpoint(number), folder / "last.ckpt")

    @staticmethod
    def overlay(folder, number):
        write_image(folder / "a.jpg.overlay.png", picture(number))

    @staticmethod
    def manifest(folder, number):
        manifest = Manifest(str(folder))
        try:
            for line in range(40):
                manifest.add(Failed(f"/in/{line}.jpg", (1, 1), str(number), reason="x" * 99))
        finally:
            manifest.close()

    @staticmethod
    def test_csv(folder, number):
        _write_csv(folder / "test.csv", [["figure", "value"], *([f"f{row}", number] for row in range(999))])

    @staticmethod
    def metrics_csv(folder, number):
        log = MetricsFile(folder)
        log.continue_after(0 if number == 1 else 250)
        for step in range(250):
            log.log_metrics({f"loss{number}": 0.5}, step=1000 * number + step)
        log.save()


def contents(folder):
    """Read every file in its format; return name → content. Fails if a file is damaged."""
    found = {}
    for path in sorted(folder.iterdir()):
        match path.suffix:
            case ".ckpt":
                found[path.name] = torch.load(path, weights_only=True)["number"]
            case ".png":
                found[path.name] = read_image(path).tobytes()
            case ".jsonl":
                found[path.name] = [json.loads(line) for line in path.read_bytes().splitlines()]
            case ".csv":
                with open(path, newline="") as file:
                    rows = list(csv.DictReader(file))
                assert all(None not in row and None not in row.values() for row in rows)
                found[path.name] = rows
    return found


WRITERS = [name for name in vars(Writers) if not name.startswith("_")]


@pytest.mark.parametrize("space", [0, 0.2, 0.4, 0.6, 0.8, "read-only"])
@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_and_unwritable_folder_damage_no_file(name, space, tmp_path):
    """`space` is the fraction of the file that can be written before the disk is full."""
    write = getattr(Writers, name)
    write(tmp_path, 1)
    before = contents(tmp_path)
    (size,) = (path.stat().st_size for path in tmp_path.iterdir())

    def write_on_full_disk():  # a limit on the size of files stands for a full disk
        limit = int(space * size) if name != "metrics_csv" else int((1 + space) * size)  # metrics.csv is appended to
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        write(tmp_path, 2)

    def write_into_read_only_folder():
        if os.getuid() == 0:  # root can write into read-only folders, so change to another user
            os.chown(tmp_path, 0, 0)
            os.setgid(65534)
            os.setuid(65534)
        write(tmp_path, 2)

    if space == "read-only":
        for path in (tmp_path, *tmp_path.iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
        for parent in tmp_path.parents[:3]:  # the other user must be able to enter pytest's folders
            parent.chmod(parent.stat().st_mode | 0o111)
    code = code_of(in_child(write_into_read_only_folder if space == "read-only" else write_on_full_disk))
    tmp_path.chmod(0o755)
    assert code == 1  # a DataError
    after = contents(tmp_path)
    if name == "manifest":  # the earlier lines are unchanged, and complete new lines may follow
        assert after["manifest.jsonl"][:40] == before["manifest.jsonl"]
    elif name == "metrics_csv":
        rows = after["metrics.csv"]
        assert [row["step"] for row in rows[:250]] == [str(step) for step in range(1000, 1250)]
    else:
        assert after == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".part.")] == []


def test_failed_save_ends_the_training_and_keeps_the_earlier_checkpoint(server, tmp_path):
    config = write_config(tmp_path)
    fault = "full_at_fsync(5)"  # enough calls for config.yaml, metrics.csv and the first last.ckpt
    ended = server.run(["fit", "--config", config, "--resume.every_n_steps=2"], tmp_path, fault=fault)
    assert ended.code == 1
    run = tmp_path / "runs" / "tiny" / "0"
    assert f"last.ckpt cannot be written: {os.strerror(errno.ENOSPC)}" in ended.output
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not list(run.glob(".*part*"))
    assert stat.S_ISREG((run / "last.ckpt").stat().st_mode)
