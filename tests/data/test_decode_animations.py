"""Test writing animations, which are read back frame by frame."""

import io

import numpy as np
import pytest
from PIL import Image

from tests.drawing.glimpses import film
from visionattn.data import write_animation
from visionattn.errors import DataError


@pytest.mark.parametrize("suffix", [".webp", ".gif"])
def test_animation_is_read_back_frame_by_frame(tmp_path, suffix):
    frames = film(300)
    path = tmp_path / f"seen{suffix}"
    write_animation(path, frames, seconds=0.5)
    assert [file.name for file in tmp_path.iterdir()] == [path.name]
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        assert image.n_frames == 2
        assert image.info["loop"] == 0
        for number, frame in enumerate(frames):
            image.seek(number)
            image.load()
            assert image.info["duration"] == (500, 1500)[number]
            assert np.abs(np.array(image.convert("RGB")).astype(int) - frame).max() <= (0 if suffix == ".webp" else 8)


def test_impossible_animations_raise(tmp_path):
    with pytest.raises(DataError, match=r"an animation is written as \.webp or \.gif"):
        write_animation(tmp_path / "seen.png", film())
    with pytest.raises(DataError, match="cannot be written"):
        write_animation(tmp_path / "none" / "seen.gif", film())
