"""Outputs do not depend on batches and threads."""

from tests.overlays.folder.exports import Tiny, photos, run
from visionattn.data.placement import Preprocess
from visionattn.overlays.explainer import Explainer
from visionattn.overlays.folder import image_export as job
from visionattn.overlays.folder.export import _default_batch_size


def test_outputs_do_not_depend_on_batches_threads_or_memory(tmp_path, monkeypatch):
    photos(tmp_path / "in")
    (tmp_path / "in" / "3.png").write_bytes(b"")
    made = []
    for name, options in {
        "a": {"batch_size": 1, "workers": 1},
        "b": {"batch_size": 100, "workers": 4},
        "c": {},
    }.items():
        if name == "c":
            monkeypatch.setattr(job, "_KEPT_BYTES", 0)  # every picture is read a second time
        run([tmp_path / "in"], tmp_path / name, **options)
        made.append({path.name: path.read_bytes() for path in (tmp_path / name).glob("*.overlay.jpg")})
    assert len(made[0]) == 6
    assert made[0] == made[1] == made[2]


def test_batches_are_smaller_the_larger_the_input_is():
    def fitting(*sizes):
        return _default_batch_size([Explainer(Tiny(), Preprocess(size)) for size in sizes])

    assert [fitting(224), fitting(448), fitting((480, 640)), fitting(64), fitting(4000)] == [16, 4, 2, 196, 1]
    assert fitting(224, 448) == 4
