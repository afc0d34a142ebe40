"""Videos are sampled at the given rate, and written videos can be read again."""

import os

import numpy as np
import pytest

from tests.overlays.folder.films import film
from tests.refusals import refuses
from visionattn.errors import DataError
from visionattn.overlays.folder.video import VideoFrames, VideoWriter

NO_LIMIT = 10**9  # pixels


def frames_of(path, **options):
    return [(at, picture) for at, picture in VideoFrames(str(path), max_pixels=NO_LIMIT, **options)]


@pytest.mark.parametrize(
    ("fps", "sampled"),
    [(None, range(12)), (100, range(12)), (10, range(12)), (5, range(0, 12, 2)), (4, [0, 3, 5, 8, 10]), (1, [0, 10])],
)
def test_frames_are_sampled_at_the_given_rate(tmp_path, fps, sampled):
    shades = [10 + 20 * number for number in range(12)]
    path = film(tmp_path / "x.mp4", shades)
    found = frames_of(path, fps=fps)
    assert [round(at * 10) for at, _ in found] == list(sampled)
    for (at, picture), number in zip(found, sampled, strict=True):
        assert picture.shape == (32, 48, 3)
        assert abs(picture.mean() - shades[number]) < 4
        assert at == pytest.approx(number / 10)
    frames = VideoFrames(str(path), fps=fps, max_pixels=NO_LIMIT)
    assert abs(frames.count - len(sampled)) <= 1
    assert frames.fps == min(fps or 10, 10)


def test_frames_are_read_and_written_in_rgb(tmp_path):
    writer = VideoWriter(str(tmp_path / "x.mp4"), 5)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    for _ in range(3):
        writer.add(red)
    writer.close()
    found = frames_of(tmp_path / "x.mp4")
    assert len(found) == 3
    assert np.abs(found[0][1].astype(int) - red).max() < 12


@pytest.mark.parametrize(("dtype", "value"), [(np.uint8, 120), (np.uint16, 120 * 257)])
def test_grey_frames_of_8_and_16_bits_are_written_and_odd_sizes_lose_a_row_and_column(tmp_path, dtype, value):
    writer = VideoWriter(str(tmp_path / "x.mp4"), 5)
    for _ in range(2):
        writer.add(np.full((17, 31), value, dtype))
    writer.close()
    found = frames_of(tmp_path / "x.mp4")
    assert found[0][1].shape == (16, 30, 3)
    assert abs(found[1][1].mean() - 120) < 4


def test_a_video_whose_name_is_not_valid_text_is_read(tmp_path):
    path = film(tmp_path / "x.mp4", [50, 60])
    renamed = os.path.join(os.fsencode(tmp_path), b"caf\xe9.mp4")
    os.rename(path, renamed)
    assert len(frames_of(os.fsdecode(renamed))) == 2


@pytest.mark.parametrize(
    ("content", "words"), [(None, "there is no video"), (b"", "read as a video"), (b"hello" * 99, "read as a video")]
)
def test_files_that_are_not_videos_or_too_large_are_refused(tmp_path, content, words, capfd):
    path = tmp_path / "x.mp4"
    if content is not None:
        path.write_bytes(content)
    refuses(DataError, words, lambda: VideoFrames(str(path), max_pixels=NO_LIMIT))
    refuses(DataError, r"32 × 48|48 × 32", lambda: VideoFrames(str(film(tmp_path / "y.mp4", [1])), max_pixels=100))
    assert capfd.readouterr().err == ""  # FFmpeg prints no message of its own


def test_videos_that_cannot_be_written_are_refused(tmp_path):
    with pytest.raises(DataError, match="cannot be written as a video"):
        VideoWriter(str(tmp_path / "x.mp4"), 5).add(np.zeros((1, 9, 3), np.uint8))
    with pytest.raises(DataError, match="cannot be written as a video"):
        VideoWriter(str(tmp_path / "nowhere" / "x.mp4"), 5).add(np.zeros((8, 8, 3), np.uint8))
