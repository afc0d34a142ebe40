"""Test samples at which the worker dies or hangs, or which cannot be loaded."""

import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset

from visionattn.data.loading.workers import Loader
from visionattn.data.samples import collate
from visionattn.errors import DataError

BAD = 7


class Spoiled(Dataset):
    """Twenty samples; loading the sample BAD calls `trouble`."""

    def __init__(self, trouble):
        self.trouble = trouble

    def __len__(self):
        return 20

    def path_of(self, index):
        return f"images/{index:02d}.jpg"

    def __getitem__(self, index):
        if index == BAD:
            self.trouble()
        return {"image": torch.zeros(1), "path": self.path_of(index)}


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def hang():
    time.sleep(600)


def fail():
    raise KeyError("no such tag")


def unreadable():
    raise DataError("images/07.jpg: cut short")


TROUBLES = {  # what happens to the sample → part of the error message
    die: "the process that read this image died",
    hang: "not read within 1 seconds",
    fail: "KeyError: 'no such tag'",
    unreadable: "cut short",
}


def loader(trouble, workers, **options):
    return Loader(Spoiled(trouble), collate=collate, batch_size=4, num_workers=workers, worker_timeout=1, **options)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_failure_stops_the_run_soon_and_names_the_file(trouble, workers):
    if not workers and trouble in (die, hang):
        return  # without workers, the test process itself would die or hang
    started = time.monotonic()
    with pytest.raises(DataError, match=r"images/07\.jpg") as raised:
        list(loader(trouble, workers))
    assert TROUBLES[trouble] in str(raised.value)
    assert "\n" not in str(raised.value)
    assert time.monotonic() - started < 30


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("trouble", TROUBLES)
def test_failure_is_skipped_and_counted(trouble, workers, capsys):
    if not workers and trouble in (die, hang):
        return
    skipped = {}
    batches = loader(trouble, workers, unreadable="skip", skipped=skipped, persistent_workers=workers > 0)
    for _ in range(2):  # the second epoch tries to load the sample again
        loaded = [path for batch in batches for path in batch["path"]]
        assert loaded == [f"images/{index:02d}.jpg" for index in range(20) if index != BAD]
    assert list(skipped) == ["images/07.jpg"]
    assert TROUBLES[trouble] in skipped["images/07.jpg"]
    assert capsys.readouterr().err.count("left out: images/07.jpg") == 1


def test_skipped_training_image_is_replaced_by_another_of_its_batch():
    batches = list(loader(fail, 0, unreadable="skip", fill=True))
    assert [len(batch["path"]) for batch in batches] == [4] * 5
    assert batches[1]["path"] == ["images/04.jpg", "images/05.jpg", "images/06.jpg", "images/04.jpg"]


def test_slow_samples_within_the_time_limit_are_loaded():
    assert sum(len(batch["path"]) for batch in loader(lambda: time.sleep(0.5), 2)) == 20
