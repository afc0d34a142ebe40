"""Several processes: their common order is that of one, whichever dies and however they are started."""

import os
import subprocess
import sys

import pytest
import torch

from tests.faults.conftest import ROOT, free_port, start_all, steps, tiny
from visionattn.training import load


def global_order(lines, together):
    """Epoch, batch → the set of images that all processes saw in it."""
    seen = {}
    for epoch, batch, _, paths, _ in lines:
        seen.setdefault((epoch, batch), set()).update(paths)
    assert all(len(paths) == together for paths in seen.values())
    return seen


@pytest.mark.parametrize(("before", "after"), [(2, 2), pytest.param(2, 1, marks=pytest.mark.slow), (1, 2)])
def test_the_order_does_not_depend_on_the_number_of_processes(before, after, server, undisturbed, tmp_path):
    _, expected = undisturbed
    order = global_order(expected.values(), 4)
    note = f"record({str(tmp_path / 'steps')!r})"

    def run(count, fault):
        config = tiny(tmp_path, batch=4 // count)
        argv = ["fit", "--config", config, "--resume.every_n_steps=1", "--ckpt_path=last"]
        if count == 1:
            return [server.start(argv, tmp_path, fault=fault)]
        return start_all(server, count, argv, tmp_path, fault)

    first, *others = run(before, f"{note}; at_step(9)")  # all die in it
    assert [child.wait().code for child in (first, *others)] == [-9] * before
    for child in (ended := [child.wait() for child in run(after, note)]):
        assert child.code == 0, child.output
    assert ended
    assert global_order(steps(tmp_path / "steps"), 4) == order
    assert len(list((tmp_path / "runs" / "tiny").iterdir())) == 1


def test_torchrun_starts_two_processes_that_share_one_run(undisturbed, tmp_path):
    """The command of README, as a user types it."""
    _, expected = undisturbed
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += ["-m", "visionattn", "fit", f"--config={tiny(tmp_path, batch=2)}", "--ckpt_path=last"]
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
def test_a_run_survives_repeated_deaths_of_one_process(kills, server, undisturbed, tmp_path):
    """The other does not wait for it for ever; together they go on with the next step."""
    _, expected = undisturbed
    config, note = tiny(tmp_path, batch=2), f"record({str(tmp_path / 'steps')!r})"
    argv = ["fit", "--config", config, "--resume.every_n_steps=1", "--ckpt_path=last"]
    for kill in range(kills):
        faults = [note, note]
        faults[kill % 2] += "; at_step(2)"
        children = start_all(server, 2, argv, tmp_path, faults=faults)
        codes = [child.wait(60).code for child in children]
        assert codes[kill % 2] == -9
        assert codes[1 - kill % 2] != 0
    for child in [child.wait() for child in start_all(server, 2, argv, tmp_path, note)]:
        assert child.code == 0, child.output
    assert global_order(steps(tmp_path / "steps"), 4) == global_order(expected.values(), 4)
    print(f"{kills} kills of one of two processes, 0 wrong batches")


def test_slurm_starts_two_processes_that_share_one_run_and_stops_both(server, undisturbed, tmp_path):
    """SIGTERM to each, as `--signal=TERM@120` has it sent; then the job is queued again."""
    _, expected = undisturbed
    config, note = tiny(tmp_path, batch=2), f"record({str(tmp_path / 'steps')!r})"
    argv = ["fit", "--config", config, "--ckpt_path=last"]
    told = [
        child.wait() for child in start_all(server, 2, argv, tmp_path, f"{note}; at_step(4, terminate)", slurm=True)
    ]
    assert [child.code for child in told] == [143, 143], told[0].output + told[1].output
    for child in [child.wait() for child in start_all(server, 2, argv, tmp_path, note, slurm=True)]:
        assert child.code == 0, child.output
    assert [path.name for path in (tmp_path / "runs" / "tiny").iterdir()] == ["0"]
    assert global_order(steps(tmp_path / "steps"), 4) == global_order(expected.values(), 4)
    assert len(steps(tmp_path / "steps")) == 2 * len(expected)  # no step was done twice


SHARDED = (
    "ModelParallelStrategy",
    "data_parallel_size=2",
    "tensor_parallel_size=1",
    "save_distributed_checkpoint=false",
)


def test_sharded_weights_train_equally_and_resume(server, tmp_path):
    """FSDP2 of torch, against DDP, which keeps all of them everywhere."""
    states = []
    for name, strategy, faults in (("all", ("ddp",), [""]), ("spread", SHARDED, ["; at_step(9)", ""])):
        home = tmp_path / name
        config, note = tiny(home, batch=2, callbacks=[]), f"record({str(home / 'steps')!r})"
        argv = ["fit", "--config", config, "--resume.every_n_steps=1", "--ckpt_path=last"]
        for fault in faults:
            children = start_all(server, 2, argv, home, note + fault, strategy=strategy)
            for ended in [child.wait() for child in children]:
                assert ended.code == (-9 if fault else 0), ended.output
        states.append(load(home / "runs" / "tiny" / "0" / "last.ckpt").state_dict())
    orders = [global_order(steps(tmp_path / name / "steps"), 4) for name in ("all", "spread")]
    assert orders[0] == orders[1]
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)
