"""Test that a training that was killed or stopped, and then resumed, equals an uninterrupted training."""

import random

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils import _pytree

from tests.data.shards_written import NAMES, write_shards
from tests.faults.conftest import DETECTION, GLIMPSES, recorded_steps, run_without_faults, write_config

RESTORED = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")


def state(path):
    """Return the flattened entries of a checkpoint that a resume must restore."""
    content = torch.load(path, weights_only=True)
    return [_pytree.tree_flatten(content[key])[0] for key in RESTORED if content[key]]


def assert_checkpoints_are_equal(first_path, second_path):
    for first, second in zip(state(first_path), state(second_path), strict=True):
        assert len(first) == len(second) > 0
        for left, right in zip(first, second, strict=True):
            assert torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


def scalars(run):
    """Return name → [(step, value)] of the numbers that TensorBoard shows."""
    events = EventAccumulator(str(run)).Reload()
    return {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}


def interrupt_and_resume(server, home, uninterrupted, faults, *, flags=(), code=-9, **options):
    """Interrupt a training with each fault in turn, resume it to the end, and compare it with the uninterrupted run.

    Returns:
        The number of steps that were repeated.
    """
    run, expected = uninterrupted
    config = write_config(home, **options)
    command = ["fit", "--config", config, *flags, "--ckpt_path=last"]  # without a checkpoint, `last` starts a training
    record = f"record({str(home / 'steps')!r})"
    for fault in faults:
        ended = server.run(command, home, fault=f"{record}; {fault}")
        assert ended.code == code, ended.output
    ended = server.run(command, home, fault=record)
    assert ended.code == 0, ended.output
    steps = recorded_steps(home / "steps")
    assert [step for step in steps if expected[tuple(step[:2])] != step] == []  # every step had the right images
    assert {tuple(step[:2]) for step in steps} == expected.keys()  # no step was left out
    (resumed,) = (home / "runs" / "tiny").iterdir()  # there is only one run
    for name in ("last.ckpt", "best.ckpt"):
        assert_checkpoints_are_equal(run / name, resumed / name)
    assert (resumed / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    assert scalars(resumed) == scalars(run)
    assert not list(resumed.glob(".*part*"))
    return len(steps) - len(expected)


@pytest.mark.parametrize(
    ("fault", "workers", "flags", "code", "repeated"),
    [
        ("at_step(9)", 2, ["--resume.every_n_steps=1"], -9, 0),  # in the middle of the second epoch
        ("at_validation_step(2)", 0, [], -9, 0),
        ("at_save(2, 'half')", 0, ["--resume.every_n_steps=2"], -9, 2),
        ("at_step(4, terminate)", 0, [], 143, 0),
    ],
)
def test_resumed_training_ends_with_equal_weights(
    fault, workers, flags, code, repeated, server, uninterrupted, tmp_path
):
    options = {"workers": workers, "flags": flags, "code": code}
    assert interrupt_and_resume(server, tmp_path, uninterrupted, [fault], **options) == repeated


def test_detector_with_random_sizes_resumes_exactly(server, tmp_path):
    expected = run_without_faults(server, tmp_path / "whole", model=DETECTION)
    options = {"model": DETECTION, "flags": ["--resume.every_n_steps=1"]}
    assert interrupt_and_resume(server, tmp_path / "killed", expected, ["at_step(9)"], **options) == 0


def test_glimpse_network_with_reinforce_resumes_exactly(server, tmp_path):
    expected = run_without_faults(server, tmp_path / "whole", model=GLIMPSES)
    options = {"model": GLIMPSES, "flags": ["--resume.every_n_steps=1"]}
    assert interrupt_and_resume(server, tmp_path / "killed", expected, ["at_step(9)"], **options) == 0


def test_training_on_shards_resumes_exactly(server, photo_folder, tmp_path):
    write_shards(photo_folder, tmp_path / "shards")
    index = str(tmp_path / "shards" / "train.json")
    options = {"train": index, "val": index, "class_names": NAMES, "preprocess": {"size": 40}, "mixed": 2}
    flip = {"transforms": [{"class_path": "albumentations.HorizontalFlip"}]}
    options["augment"] = {"class_path": "visionattn.data.transforms.Augmentation", "init_args": flip}
    data = {"class_path": "visionattn.data.ShardData", "init_args": options}
    expected = run_without_faults(server, tmp_path / "whole", batch=12, data=data)
    faults = ["at_step(3)", "at_step(4)"]
    options = {"flags": ["--resume.every_n_steps=1"], "data": data, "batch": 12, "workers": 2}
    assert interrupt_and_resume(server, tmp_path / "killed", expected, faults, **options) == 0


def test_next_training_removes_what_a_kill_before_the_first_checkpoint_left(server, tmp_path):
    command = ["fit", "--config", write_config(tmp_path, train=4)]
    assert server.run(command, tmp_path, fault="at_save(1, 'half')").code == -9
    runs = tmp_path / "runs" / "tiny"
    assert (runs / "0" / ".part.last.ckpt").exists()
    ended = server.run(command, tmp_path)
    assert ended.code == 0, ended.output
    assert (runs / "1" / "last.ckpt").exists()
    assert not list(runs.rglob(".part.*"))


def test_second_process_cannot_train_the_same_run(server, uninterrupted, tmp_path):
    config = write_config(tmp_path)
    command = ["fit", "--config", config, "--ckpt_path=last"]
    hanging = server.start(command, tmp_path, fault="at_step(8, hang)")
    try:
        while not (tmp_path / "runs" / "tiny" / "0" / "last.ckpt").exists():
            assert hanging.output == "" or "starts a new training" in hanging.output
        ended = server.run(command, tmp_path)
        assert ended.code == 2, ended.output
        assert "runs/tiny/0 is being trained by another process" in ended.output
        assert "runs/tiny/0/last.ckpt" in ended.output
    finally:
        hanging.kill(9)
        hanging.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_hundred_kills_cause_no_wrong_batch(server, uninterrupted, tmp_path):
    """Kill each of ten trainings ten times, at random steps and in validations; five have worker processes."""
    generator = random.Random(0)
    kills = 0
    for number in range(10):
        # kill early after each resume, since otherwise the training would end before the tenth kill
        moments = ["at_step(2)", "at_step(1, after=True)", "at_step(2, after=True)", "at_validation_step(1)"]
        faults = [generator.choice(moments) for _ in range(10)]
        home = tmp_path / str(number)
        kill_and_resume(server, home, uninterrupted, faults, workers=2 * (number % 2))
        kills += len(faults)
        print(f"{kills} kills, 0 wrong batches", flush=True)


def kill_and_resume(server, home, uninterrupted, faults, *, workers):
    """Do the same as `interrupt_and_resume`; if the training ends before a fault, kill it in the last validation."""
    run, expected = uninterrupted
    config = write_config(home, workers=workers)
    command = ["fit", "--config", config, "--resume.every_n_steps=1", "--ckpt_path=last"]
    record = f"record({str(home / 'steps')!r})"
    for fault in faults:
        ended = server.run(command, home, fault=f"{record}; {fault}")
        if ended.code == 0:  # the training has ended, and another resume only repeats the last validation
            ended = server.run(command, home, fault=f"{record}; at_validation_step(1)")
        assert ended.code == -9, ended.output
    ended = server.run(command, home, fault=record)
    assert ended.code == 0, ended.output
    steps = recorded_steps(home / "steps")
    assert [step for step in steps if expected[tuple(step[:2])] != step] == []
    assert {tuple(step[:2]) for step in steps} == expected.keys()
    *_, last_run = sorted((home / "runs" / "tiny").iterdir())  # a kill before the first checkpoint leads to a new run
    for name in ("last.ckpt", "best.ckpt"):
        assert_checkpoints_are_equal(run / name, last_run / name)
