"""Videos are sampled at the given rate, and written videos can be read again."""

import os

import numpy as np
import pytest

from tests.overlays.folder.films import film
from tests.refusals import refuses
from visionattn.errors import DataError
from visionattn.overlays.folder.video import VideoFrames, VideoWriter

MANY = 10**9


def shades_of(path, **options):
    return [(at, picture) for at, picture in VideoFrames(str(path), max_pixels=MANY, **options)]


@pytest.mark.parametrize(
    ("fps", "taken"),
    [(None, range(12)), (100, range(12)), (10, range(12)), (5, range(0, 12, 2)), (4, [0, 3, 5, 8, 10]), (1, [0, 10])],
)
def test_frames_are_sampled_at_their_times(tmp_path, fps, taken):
    shades = [10 + 20 * number for number in range(12)]
    path = film(tmp_path / "x.mp4", shades)
    found = shades_of(path, fps=fps)
    assert [round(at * 10) for at, _ in found] == list(taken)
    for (at, picture), number in zip(found, taken, strict=True):
        assert picture.shape == (32, 48, 3)
        assert abs(picture.mean() - shades[number]) < 4
        assert at == pytest.approx(number / 10)
    frames = VideoFrames(str(path), fps=fps, max_pixels=MANY)
    assert abs(frames.count - len(taken)) <= 1
    assert frames.fps == min(fps or 10, 10)


def test_frames_are_read_and_written_in_rgb(tmp_path):
    written = VideoWriter(str(tmp_path / "x.mp4"), 5)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    for _ in range(3):
        written.add(red)
    written.close()
    found = shades_of(tmp_path / "x.mp4")
    assert len(found) == 3
    assert np.abs(found[0][1].astype(int) - red).max() < 12


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 120), (np.uint16, 120 * 257)])
def test_grey_frames_of_8_and_16_bits_and_of_odd_size(tmp_path, dtype, value):
    written = VideoWriter(str(tmp_path / "x.mp4"), 5)
    for _ in range(2):
        written.add(np.full((17, 31), value, dtype))
    written.close()
    found = shades_of(tmp_path / "x.mp4")
    assert found[0][1].shape == (16, 30, 3)
    assert abs(found[1][1].mean() - 120) < 4


def test_a_video_whose_name_is_not_valid_text_is_read(tmp_path):
    path = film(tmp_path / "x.mp4", [50, 60])
    odd = os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4")
    os.rename(path, odd)
    assert len(shades_of(os.fsdecode(odd))) == 2


@pytest.mark.parametrize(
    ("content", "words"), [(None, "there is no video"), (b"", "read as a video"), (b"hello" * 99, "read as a video")]
)
def test_other_files_than_videos_are_refused(tmp_path, content, words, capfd):
    path = tmp_path / "x.mp4"
    if content is not None:
        path.write_bytes(content)
    refuses(DataError, words, lambda: VideoFrames(str(path), max_pixels=MANY))
    refuses(DataError, r"32 × 48|48 × 32", lambda: VideoFrames(str(film(tmp_path / "y.mp4", [1])), max_pixels=100))
    assert capfd.readouterr().err == ""  # FFmpeg has its own way of telling


def test_videos_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be written as a video"):
        VideoWriter(str(tmp_path / "x.mp4"), 5).add(np.zeros((1, 9, 3), np.uint8))
    with pytest.raises(DataError, match="cannot be written as a video"):
        VideoWriter(str(tmp_path / "nowhere" / "x.mp4"), 5).add(np.zeros((8, 8, 3), np.uint8))
