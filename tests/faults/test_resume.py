"""A training that was killed, stopped or out of disk space, and then continued, equals an uninterrupted one."""

import random

import pytest
import torch
from torch.utils import _pytree

from tests.data.shards_written import NAMES, write_shards
from tests.faults.conftest import DETECTION, GLIMPSES, steps, tiny, whole

RESTORED = ("state_dict", "current_model_state", "averaging_state", "optimizer_states", "lr_schedulers")


def state(path):
    content = torch.load(path, weights_only=True)
    return [_pytree.tree_flatten(content[key])[0] for key in RESTORED if content[key]]


def assert_equal_to_the_bit(first, second):
    for left, right in zip(state(first), state(second), strict=True):
        assert len(left) == len(right) > 0
        for one, other in zip(left, right, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def disturb(server, home, undisturbed, faults, *, flags=(), code=-9, **options):
    """Run with one fault after the other, then to the end; compare everything; tell how many steps were done twice."""
    run, expected = undisturbed
    config = tiny(home, **options)
    command = ["fit", "--config", config, *flags, "--ckpt_path=last"]  # the first finds none, says so, and begins
    note = f"record({str(home / 'steps')!r})"
    for fault in faults:
        ended = server.run(command, home, fault=f"{note}; {fault}")
        assert ended.code == code, ended.output
    ended = server.run(command, home, fault=note)
    assert ended.code == 0, ended.output
    done = steps(home / "steps")
    assert [line for line in done if expected[tuple(line[:2])] != line] == []  # no wrong batch
    assert {tuple(line[:2]) for line in done} == expected.keys()  # and none left out
    (again,) = (home / "runs" / "tiny").iterdir()  # in the same folder
    for name in ("last.ckpt", "best.ckpt"):
        assert_equal_to_the_bit(run / name, again / name)
    assert (again / "metrics.csv").read_text() == (run / "metrics.csv").read_text()
    assert not list(again.glob(".*part*"))
    return len(done) - len(expected)


@pytest.mark.parametrize(
    ("fault", "workers", "flags", "code", "twice"),
    [
        ("at_step(9)", 2, ["--resume.every_n_steps=1"], -9, 0),  # mid-epoch, in the second one
        ("at_validation_step(2)", 0, [], -9, 0),
        ("at_save(2, 'half')", 0, ["--resume.every_n_steps=2"], -9, 2),
        ("at_step(4, terminate)", 0, [], 143, 0),
    ],
)
def test_a_continued_training_ends_with_equal_weights(
    fault, workers, flags, code, twice, server, undisturbed, tmp_path
):
    assert disturb(server, tmp_path, undisturbed, [fault], workers=workers, flags=flags, code=code) == twice


def test_a_detector_with_random_sizes_resumes_exactly(server, tmp_path):
    expected = whole(server, tmp_path / "whole", model=DETECTION)
    flags = ["--resume.every_n_steps=1"]
    assert disturb(server, tmp_path / "again", expected, ["at_step(9)"], model=DETECTION, flags=flags) == 0


def test_a_glimpse_network_with_reinforce_resumes_exactly(server, tmp_path):
    expected = whole(server, tmp_path / "whole", model=GLIMPSES)
    flags = ["--resume.every_n_steps=1"]
    assert disturb(server, tmp_path / "killed", expected, ["at_step(9)"], flags=flags, model=GLIMPSES) == 0


def test_a_training_on_shards_resumes_exactly(server, photo_folder, tmp_path):
    write_shards(photo_folder, tmp_path / "shards")
    where = str(tmp_path / "shards" / "train.json")
    options = {"train": where, "val": where, "class_names": NAMES, "preprocess": {"size": 40}, "mixed": 2}
    flip = {"transforms": [{"class_path": "albumentations.HorizontalFlip"}]}
    options["augment"] = {"class_path": "visionattn.data.transforms.Augmentation", "init_args": flip}
    data = {"class_path": "visionattn.data.ShardData", "init_args": options}
    expected = whole(server, tmp_path / "whole", batch=12, data=data)
    flags = ["--resume.every_n_steps=1"]
    again = {"flags": flags, "data": data, "batch": 12, "workers": 2}
    assert disturb(server, tmp_path / "again", expected, ["at_step(3)", "at_step(4)"], **again) == 0


def test_a_run_is_trained_by_one_process_and_names_its_checkpoint(server, undisturbed, tmp_path):
    config = tiny(tmp_path)
    command = ["fit", "--config", config, "--ckpt_path=last"]
    sleeping = server.start(command, tmp_path, fault="at_step(8, hang)")
    try:
        while not (tmp_path / "runs" / "tiny" / "0" / "last.ckpt").exists():
            assert sleeping.output == "" or "starts a new training" in sleeping.output
        ended = server.run(command, tmp_path)
        assert ended.code == 2, ended.output
        assert "runs/tiny/0 is being trained by another process" in ended.output
        assert "runs/tiny/0/last.ckpt" in ended.output
    finally:
        sleeping.kill(9)
        sleeping.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_hundred_kills_and_no_wrong_batch(server, undisturbed, tmp_path):
    """Ten trainings of ten kills each, at steps and in validations drawn at random; half with worker processes."""
    draw = random.Random(0)
    kills = 0
    for number in range(10):
        # each life reaches a little further than it resumed, else the training would end before its kills do
        faults = [
            draw.choice(["at_step(2)", "at_step(1, after=True)", "at_step(2, after=True)", "at_validation_step(1)"])
            for _ in range(10)
        ]
        home = tmp_path / str(number)
        disturb_until_done(server, home, undisturbed, faults, workers=2 * (number % 2))
        kills += len(faults)
        print(f"{kills} kills, 0 wrong batches", flush=True)


def disturb_until_done(server, home, undisturbed, faults, *, workers):
    """As `disturb`, where a fault that is not reached any more becomes a kill in the last validation."""
    run, expected = undisturbed
    config = tiny(home, workers=workers)
    command = ["fit", "--config", config, "--resume.every_n_steps=1", "--ckpt_path=last"]
    note = f"record({str(home / 'steps')!r})"
    for fault in faults:
        ended = server.run(command, home, fault=f"{note}; {fault}")
        if ended.code == 0:  # it was at its end: a last validation remains
            ended = server.run(command, home, fault=f"{note}; at_validation_step(1)")
        assert ended.code == -9, ended.output
    ended = server.run(command, home, fault=note)
    assert ended.code == 0, ended.output
    done = steps(home / "steps")
    assert [line for line in done if expected[tuple(line[:2])] != line] == []
    assert {tuple(line[:2]) for line in done} == expected.keys()
    *_, again = sorted((home / "runs" / "tiny").iterdir())  # one that died before its first checkpoint began anew
    for name in ("last.ckpt", "best.ckpt"):
        assert_equal_to_the_bit(run / name, again / name)
