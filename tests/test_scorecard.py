"""The file of figures that `visionattn score` writes: whole or not at all."""

import contextlib
import json
import resource

import numpy as np
import pytest

from visionattn.errors import DataError
from visionattn.maps import Scores
from visionattn.scorecard import write

SCORES = Scores(
    {"raw": {"deletion": np.linspace(0, 1, 40, dtype=np.float32)}, "centre": {"deletion": np.ones(40, np.float32)}},
    controls={"raw": ("centre",)},
    failed={},
    accuracy=None,
    paths=tuple(f"{index}.png" for index in range(40)),
    seed=0,
)


@contextlib.contextmanager
def a_disk_with_room_for(size):
    """No file grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("suffix", [".csv", ".json"])
@pytest.mark.parametrize("older", [b"older figures", None], ids=["older", "no older"])
def test_a_disk_that_is_full_in_the_middle_leaves_the_older_file_whole(suffix, older, tmp_path):
    path = tmp_path / f"scores{suffix}"
    if older:
        path.write_bytes(older)
    with (
        a_disk_with_room_for(100),
        pytest.raises(DataError, match=rf"scores{suffix} cannot be written: File too large"),
    ):
        write(str(path), SCORES)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([older] if older else [])
    write(str(path), SCORES)
    assert path.stat().st_size > 100


def test_ctrl_c_in_the_middle_leaves_the_older_file_whole_and_nothing_beside_it(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    path.write_text("older figures")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(str(path), SCORES)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older figures"]


def test_a_newer_file_takes_the_place_of_an_older_one(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("older figures")
    write(str(path), SCORES)
    assert json.loads(path.read_text())["of_images"]["raw"]["deletion"] == SCORES.values["raw"]["deletion"].tolist()
