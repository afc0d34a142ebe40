"""Test training in several processes: the order of images equals that of one process, also after kills."""

import os
import subprocess
import sys

import pytest
import torch

from tests.faults.conftest import ROOT, free_port, recorded_steps, start_all, write_config
from visionattn.training import load


def global_order(steps, batch_size):
    """Return (epoch, batch) → the set of images of all processes; each set must have `batch_size` images."""
    images = {}
    for epoch, batch, _, paths, _ in steps:
        images.setdefault((epoch, batch), set()).update(paths)
    assert all(len(paths) == batch_size for paths in images.values())
    return images


@pytest.mark.parametrize(("before", "after"), [(2, 2), pytest.param(2, 1, marks=pytest.mark.slow), (1, 2)])
def test_order_does_not_depend_on_the_number_of_processes(before, after, server, uninterrupted, tmp_path):
    """A training with `before` processes is killed, and resumed with `after` processes."""
    _, expected = uninterrupted
    order = global_order(expected.values(), 4)
    record = f"record({str(tmp_path / 'steps')!r})"

    def run(count, fault):
        config = write_config(tmp_path, batch=4 // count)
        argv = ["fit", "--config", config, "--resume.every_n_steps=1", "--ckpt_path=last"]
        if count == 1:
            return [server.start(argv, tmp_path, fault=fault)]
        return start_all(server, count, argv, tmp_path, fault)

    first, *others = run(before, f"{record}; at_step(9)")  # kills all processes in the ninth step
    assert [child.wait().code for child in (first, *others)] == [-9] * before
    for child in (ended := [child.wait() for child in run(after, record)]):
        assert child.code == 0, child.output
    assert ended
    assert global_order(recorded_steps(tmp_path / "steps"), 4) == order
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 1


def test_torchrun_starts_two_processes_that_share_one_run(uninterrupted, tmp_path):
    """The command is that of the training README, with a smaller config."""
    _, expected = uninterrupted
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["-m", "visionattn", "fit", f"--config={write_config(tmp_path, batch=2)}", "--ckpt_path=last"]
    command += ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    ended = subprocess.run(
        [sys.executable, *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ended.returncode == 0, ended.stderr
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["0"]
    run = tmp_path / "runs" / "tiny" / "0"
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == len(expected)
    assert ended.stderr.count("starts a new training") == 1


@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])])
def test_run_can_be_resumed_after_repeated_kills_of_one_of_two_processes(kills, server, uninterrupted, tmp_path):
    """After each kill, the other process ends too, instead of waiting forever."""
    _, expected = uninterrupted
    config, record = write_config(tmp_path, batch=2), f"record({str(tmp_path / 'steps')!r})"
    argv = ["fit", "--config", config, "--resume.every_n_steps=1", "--ckpt_path=last"]
    for kill in range(kills):
        faults = [record, record]
        faults[kill % 2] += "; at_step(2)"
        children = start_all(server, 2, argv, tmp_path, faults=faults)
        codes = [child.wait(60).code for child in children]
        assert codes[kill % 2] == -9
        assert codes[1 - kill % 2] != 0
    for child in [child.wait() for child in start_all(server, 2, argv, tmp_path, record)]:
        assert child.code == 0, child.output
    assert global_order(recorded_steps(tmp_path / "steps"), 4) == global_order(expected.values(), 4)
    print(f"{kills} kills of one of two processes, 0 wrong batches")


def test_slurm_starts_two_processes_that_share_one_run_and_stops_both(server, uninterrupted, tmp_path):
    """Both processes get SIGTERM, as from `--signal=TERM@120`; then the requeued job resumes the run."""
    _, expected = uninterrupted
    config, record = write_config(tmp_path, batch=2), f"record({str(tmp_path / 'steps')!r})"
    argv = ["fit", "--config", config, "--ckpt_path=last"]
    stopping = start_all(server, 2, argv, tmp_path, f"{record}; at_step(4, terminate)", slurm=True)
    stopped = [child.wait() for child in stopping]
    assert [child.code for child in stopped] == [143, 143], stopped[0].output + stopped[1].output
    for child in [child.wait() for child in start_all(server, 2, argv, tmp_path, record, slurm=True)]:
        assert child.code == 0, child.output
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["0"]
    assert global_order(recorded_steps(tmp_path / "steps"), 4) == global_order(expected.values(), 4)
    assert len(recorded_steps(tmp_path / "steps")) == 2 * len(expected)  # no step was repeated


SHARDED = (
    "ModelParallelStrategy",
    "data_parallel_size=2",
    "tensor_parallel_size=1",
    "save_distributed_checkpoint=false",
)


def test_sharded_weights_train_equally_and_resume(server, tmp_path):
    """torch's FSDP2, killed once and resumed, learns the same weights as DDP, which copies all weights."""
    states = []
    for name, strategy, faults in (("copied", ("ddp",), [""]), ("sharded", SHARDED, ["; at_step(9)", ""])):
        home = tmp_path / name
        config, record = write_config(home, batch=2, callbacks=[]), f"record({str(home / 'steps')!r})"
        argv = ["fit", "--config", config, "--resume.every_n_steps=1", "--ckpt_path=last"]
        for fault in faults:
            children = start_all(server, 2, argv, home, record + fault, strategy=strategy)
            for ended in [child.wait() for child in children]:
                assert ended.code == (-9 if fault else 0), ended.output
        states.append(load(home / "runs" / "tiny" / "0" / "last.ckpt").state_dict())
    orders = [global_order(recorded_steps(tmp_path / name / "steps"), 4) for name in ("copied", "sharded")]
    assert orders[0] == orders[1]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)
