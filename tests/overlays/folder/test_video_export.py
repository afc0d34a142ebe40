"""The export of a video writes a video. If the export of one video fails, the other outputs are still made."""

import os
import re

import numpy as np
import pytest
import torch

from tests.overlays.folder.disks import disk_full_after
from tests.overlays.folder.exports import Tiny, bright, manifest, photos, run, snapshot
from tests.overlays.folder.films import film
from visionattn.data.placement import Preprocess
from visionattn.errors import DataError
from visionattn.overlays.folder.video import VideoFrames


def test_a_video_is_exported_frame_by_frame_into_videos_and_arrays(tmp_path):
    shades = [20 + 18 * number for number in range(9)]
    path = film(tmp_path / "in.mp4", shades, size=(32, 64))
    photos(tmp_path / "in", 4)
    inputs = [tmp_path / "in", path]
    summary = run(inputs, tmp_path / "out", save=("overlay", "array", "heatmap"), fps=5)
    assert (summary.written, summary.failed) == (5, 0)
    entry = manifest(tmp_path / "out")["in.mp4"]
    assert entry["outputs"] == {
        "overlay": "in.mp4.overlay.mp4",
        "array": "in.mp4.array.npz",
        "heatmap": "in.mp4.heatmap.mp4",
    }
    frames = entry["frames"]
    assert frames["at"] == [0.0, 0.2, 0.4, 0.6, 0.8]
    assert {len(column) for column in frames.values()} == {5}
    most_confident = int(np.argmax(frames["probability"]))
    for key in ("prediction", "probability", "peak"):
        assert entry[key] == frames[key][most_confident]
    model = Tiny().eval()
    arrays = np.load(tmp_path / "out" / "in.mp4.array.npz")
    for number, (_, picture) in enumerate(VideoFrames(str(path), fps=5, max_pixels=10**6)):
        tensor, _ = Preprocess(16)(picture)
        maps = bright(model, torch.from_numpy(tensor)[None])
        assert frames["probability"][number] == pytest.approx(float(maps.output.softmax(1).max()), abs=2e-6)
        np.testing.assert_allclose(arrays["heatmap"][number], maps.heatmaps[0], atol=1e-6)
    shown = [picture for _, picture in VideoFrames(str(tmp_path / "out" / "in.mp4.overlay.mp4"), max_pixels=10**6)]
    assert [picture.shape for picture in shown] == [(32, 64, 3)] * 5
    brightness = [picture[:, :8].mean() for picture in shown]  # outside of the crop, frames are only shaded
    assert sorted(brightness) == brightness  # the frames are in order
    before = snapshot(tmp_path / "out")
    assert run(inputs, tmp_path / "out", save=("overlay", "array", "heatmap"), fps=5).skipped == 5
    assert snapshot(tmp_path / "out") == before
    assert run(inputs, tmp_path / "out", save=("overlay",), fps=2).written == 1  # only the video
    assert sorted(path.name for path in (tmp_path / "out").iterdir() if path.name.startswith(".")) == []


@pytest.mark.parametrize("cause", ["no video", "no frame", "not finite", "full disk"])
def test_a_video_that_fails_leaves_no_files_and_the_images_are_exported(tmp_path, cause):
    photos(tmp_path / "in", 2)
    path = film(tmp_path / "x.mp4", [250 if number == 4 else 90 for number in range(6)], size=(320, 320))
    method, limit = bright, 10**9

    def refuse_bright(model, images_BCHW, *, target=None):
        if (images_BCHW.mean((1, 2, 3)) > 2).any():
            raise DataError("the images hold NaN or infinity")
        return bright(model, images_BCHW)

    if cause == "no video":
        path.write_bytes(b"nothing")
    elif cause == "no frame":
        film(path, [])
    elif cause == "not finite":
        method = refuse_bright
    else:
        limit = 3000
    with disk_full_after(limit):
        summary = run([tmp_path / "in", path], tmp_path / "out", method=method, save=("overlay", "array"))
    assert (summary.written, summary.failed) == (2, 1)
    reason = manifest(tmp_path / "out")["x.mp4"]["reason"]
    expected = {"not finite": "NaN or infinity", "full disk": "cannot be written"}.get(cause, "as a video|no readable")
    assert re.search(expected, reason)
    assert not [name for name in os.listdir(tmp_path / "out") if "x.mp4" in name or name.startswith(".")]
