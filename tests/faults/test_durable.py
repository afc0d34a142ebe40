"""Files are complete after kills, on a full disk, and in unwritable folders."""

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

from tests.faults.conftest import tiny
from visionattn.data import read_image, write_image
from visionattn.errors import DataError
from visionattn.overlays.folder.manifest import Failed, Manifest
from visionattn.training.callbacks.metrics_file import MetricsFile
from visionattn.training.callbacks.report import _write_csv
from visionattn.training.checkpoint_io import DurableCheckpointIO

OTHER_DISK = "/dev/shm"  # another file system than the one that the tests write to, where there is one


def checkpoint(number):
    return {"number": number, "state_dict": {"weight": torch.full((100_000,), float(number))}}


def in_child(act):
    """Run `act` in a process of its own; return its pid."""
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
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("kills", [12, pytest.param(200, marks=pytest.mark.slow)])
def test_no_kill_while_saving_leaves_a_checkpoint_that_cannot_be_loaded(kills, tmp_path, monkeypatch):
    draw = random.Random(0)
    path = tmp_path / "last.ckpt"
    DurableCheckpointIO().save_checkpoint(checkpoint(0), path)
    reached = 0
    for kill in range(kills):
        if kill % 2 and os.path.isdir(OTHER_DISK):
            monkeypatch.setenv("TMPDIR", OTHER_DISK)
        else:
            monkeypatch.delenv("TMPDIR", raising=False)

        def save_for_ever(start=reached):
            for number in range(start + 1, start + 10_000):
                DurableCheckpointIO().save_checkpoint(checkpoint(number), path)

        pid = in_child(save_for_ever)
        time.sleep(draw.uniform(0.001, 0.06))
        os.kill(pid, signal.SIGKILL)
        assert code_of(pid) == -signal.SIGKILL
        content = torch.load(path, weights_only=True)
        assert content["number"] >= reached  # the earlier one or a later
        assert (content["state_dict"]["weight"] == content["number"]).all()
        reached = content["number"]
        assert set(os.listdir(tmp_path)) <= {"last.ckpt", ".part.last.ckpt"}  # one leftover at most
    assert reached > 0
    DurableCheckpointIO().save_checkpoint(checkpoint(-1), path)
    assert os.listdir(tmp_path) == ["last.ckpt"]  # and it was written over


def picture(number):
    return np.random.default_rng(number).integers(0, 255, (64, 64, 3), dtype=np.uint8)


class Writers:
    """How each kind of file is written, in an earlier and a later form, and which bytes it has on the way."""

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
    def csv_of_figures(folder, number):
        _write_csv(folder / "test.csv", [["figure", "value"], *([f"f{row}", number] for row in range(999))])

    @staticmethod
    def csv_of_steps(folder, number):
        log = MetricsFile(folder)
        log.continue_at(1000 * number)
        for step in range(250):
            log.log_metrics({f"loss{number}": 0.5}, step=1000 * number + step)
        log.save()


def readable(folder):
    """Every file, read as what it is."""
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


@pytest.mark.parametrize("share", [0, 0.2, 0.4, 0.6, 0.8, "read-only"])
@pytest.mark.parametrize("name", WRITERS)
def test_a_full_disk_and_an_unwritable_folder_damage_no_file(name, share, tmp_path):
    write = getattr(Writers, name)
    write(tmp_path, 1)
    before = readable(tmp_path)
    (size,) = (path.stat().st_size for path in tmp_path.iterdir())

    def full():
        limit = int(share * size) if name != "csv_of_steps" else int((1 + share) * size)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        write(tmp_path, 2)

    def read_only():
        if os.getuid() == 0:  # who may do everything
            os.chown(tmp_path, 0, 0)
            os.setgid(65534)
            os.setuid(65534)
        write(tmp_path, 2)

    if share == "read-only":
        for place in (tmp_path, *tmp_path.iterdir()):
            place.chmod(0o555 if place.is_dir() else 0o444)
        for parent in tmp_path.parents[:3]:  # pytest's own, and those of its processes
            parent.chmod(parent.stat().st_mode | 0o111)
    code = code_of(in_child(read_only if share == "read-only" else full))
    tmp_path.chmod(0o755)
    assert code == 1  # a DataError
    after = readable(tmp_path)
    if name == "manifest":  # lines are added: those of before stand as they were, and what came is whole
        assert after["manifest.jsonl"][:40] == before["manifest.jsonl"]
    elif name == "csv_of_steps":
        rows = after["metrics.csv"]
        assert [row["step"] for row in rows[:250]] == [str(step) for step in range(1000, 1250)]
    else:
        assert after == before
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".part.")] == []


def test_a_failed_save_ends_the_training_and_keeps_the_earlier_checkpoint(server, tmp_path):
    config = tiny(tmp_path)
    fault = "full_at_fsync(5)"  # config.yaml, then metrics.csv and the first last.ckpt with their folders went well
    ended = server.run(["fit", "--config", config, "--resume.every_n_steps=2"], tmp_path, fault=fault)
    assert ended.code == 1
    run = tmp_path / "runs" / "tiny" / "0"
    assert f"last.ckpt cannot be written: {os.strerror(errno.ENOSPC)}" in ended.output
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 2
    assert not list(run.glob(".*part*"))
    assert stat.S_ISREG((run / "last.ckpt").stat().st_mode)
