"""Outputs do not depend on batch size, threads or memory; batches fit the input size; warnings reach the summary."""

import warnings

import pytest

from tests.overlays.folder.exports import Tiny, bright, photos, run
from visionattn.data.placement import Preprocess
from visionattn.errors import warn
from visionattn.overlays.explainer import Explainer
from visionattn.overlays.folder import image_export
from visionattn.overlays.folder.export import _default_batch_size


def test_outputs_do_not_depend_on_batches_threads_or_memory(tmp_path, monkeypatch):
    photos(tmp_path / "in")
    (tmp_path / "in" / "3.png").write_bytes(b"")
    outputs = []
    for name, options in {
        "single": {"batch_size": 1, "workers": 1},
        "large": {"batch_size": 100, "workers": 4},
        "no_memory": {},
    }.items():
        if name == "no_memory":
            monkeypatch.setattr(image_export, "_KEPT_BYTES", 0)  # every picture is read a second time
        run([tmp_path / "in"], tmp_path / name, **options)
        outputs.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.overlay.jpg")})
    assert len(outputs[0]) == 6
    assert outputs[0] == outputs[1] == outputs[2]


def test_the_default_batch_size_falls_with_the_size_of_the_input():
    def batch_size(*sizes):
        return _default_batch_size([Explainer(Tiny(), Preprocess(size)) for size in sizes])

    assert [batch_size(size) for size in (224, 448, (480, 640), 64, 4000)] == [16, 4, 2, 196, 1]
    assert batch_size(224, 448) == 4  # two models: the larger input counts


def test_map_warnings_of_a_method_reach_the_summary_and_other_warnings_the_user(tmp_path):
    def doubtful(model, images_BCHW, *, target=None):
        warn(f"{len(images_BCHW)} heatmaps are doubtful")
        warnings.warn("of another library", DeprecationWarning, stacklevel=1)
        return bright(model, images_BCHW, target=target)

    photos(tmp_path / "in")
    with pytest.warns(DeprecationWarning, match="another library"):
        summary = run([tmp_path / "in"], tmp_path / "out", method=doubtful)
    assert summary.warnings == ["3 heatmaps are doubtful"]
