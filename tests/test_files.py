"""Files are complete or absent, and their names can be printed."""

import pytest

from tests.commands.scores import SCORES
from tests.overlays.folder.disks import disk_full_after
from visionattn.commands.scorecard import write
from visionattn.errors import DataError
from visionattn.files import printable


@pytest.mark.parametrize("suffix", [".csv", ".json"])
@pytest.mark.parametrize("older", [b"older figures", None], ids=["older", "no older"])
def test_a_full_disk_keeps_the_older_file(suffix, older, tmp_path):
    path = tmp_path / f"scores{suffix}"
    if older:
        path.write_bytes(older)
    with (
        disk_full_after(100),
        pytest.raises(DataError, match=rf"scores{suffix} cannot be written: File too large"),
    ):
        write(str(path), SCORES)
    assert [file.read_bytes() for file in tmp_path.iterdir()] == ([older] if older else [])
    write(str(path), SCORES)
    assert path.stat().st_size > 100


def test_ctrl_c_keeps_the_older_file_and_no_temporary_one(tmp_path, monkeypatch):
    path = tmp_path / "scores.json"
    path.write_text("older figures")

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(str(path), SCORES)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["older figures"]


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"caf\xe9.jpg", "caf�.jpg"),
        ("a\x1b[31m.jpg", "a�[31m.jpg"),
        ("a\nb", "a�b"),
        ("ảnh 犬.png", "ảnh 犬.png"),
        ("no\u00a0break", "no break"),
    ],
)
def test_printable_is_safe_for_any_terminal(name, shown):
    assert printable(name) == shown
    shown.encode()
