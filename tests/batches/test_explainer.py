"""Rows of heatmaps equal those of single pictures, and an image that fails is a row that says why."""

import io
import pickle
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from PIL import Image

import visionattn as va
from tests.batches.pictures import make_and_note, make_model, write_pictures
from tests.refusals import refuses
from visionattn.batches import Explainer
from visionattn.data import Placement, Preprocess
from visionattn.drawing import Style
from visionattn.errors import UsageError

PREPROCESS = Preprocess(160, fit="letterbox")


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    return [str(path) for path in write_pictures(tmp_path_factory.mktemp("pictures"))]


def explainer(**options):
    return Explainer(make_model(), **{"method": "chefer", "preprocess": PREPROCESS, **options})


def test_every_row_equals_the_heatmap_of_the_single_picture(paths):
    rows = explainer(save=["heat", "overlay"], style=Style(suffix=".png"))({"path": paths}).to_pylist()
    assert len(rows) == 3
    for path, row in zip(paths, rows, strict=True):
        alone = va.heatmap(make_model(), path, method="chefer", preprocess=PREPROCESS)
        grid = np.frombuffer(row["heat"], "<f2").reshape(row["heat_shape"])
        np.testing.assert_allclose(grid, alone.explained.heatmap_hw, atol=2e-3)
        assert (row["path"], row["error"]) == (path, None)
        facts = alone.to_dict()
        for name in ("width", "height", "method", "layer", "target", "prediction", "class"):
            assert row[name] == facts[name], name
        np.testing.assert_allclose(row["probability"], facts["probability"], atol=1e-5)
        np.testing.assert_allclose(row["peak"], facts["peak"], atol=0.01)
        drawn = np.asarray(Image.open(io.BytesIO(row["overlay"])), int)
        assert np.abs(drawn - alone.overlay()).max() <= 2


def test_the_placement_of_a_row_carries_its_heat_to_the_picture(paths):
    (row,) = explainer()({"path": paths[:1]}).to_pylist()
    grid = np.frombuffer(row["heat"], "<f2").reshape(row["heat_shape"])
    matrix = np.reshape(row["placement"], (2, 3))
    values = Placement(matrix, (row["height"], row["width"]), grid.shape).carry(grid)
    alone = va.heatmap(make_model(), paths[0], method="chefer", preprocess=PREPROCESS)
    np.testing.assert_allclose(values, alone.values, atol=5e-3)


def test_targets_come_from_their_column_by_index_or_name(paths):
    explain = explainer(target="bird")
    assert explain({"path": paths})["target"].to_pylist() == [2, 2, 2]
    table = explain({"path": paths, "target": ["cat", None, "dog"]})
    assert table["target"].to_pylist() == [0, 2, 1]
    assert explain({"path": paths[:2], "target": np.array([1.0, np.nan])})["target"].to_pylist() == [1, 2]
    rows = explain({"path": paths, "target": ["cat", "horse", None]}).to_pylist()
    assert [row["target"] for row in rows] == [0, None, 2]
    assert "horse" in rows[1]["error"]


def test_pictures_that_fail_are_rows_with_an_error_and_the_others_are_as_before(paths, tmp_path):
    (tmp_path / "cut.png").write_bytes(Path(paths[0]).read_bytes()[:200])
    expected = explainer()({"path": paths}).to_pylist()
    names = [
        paths[0],
        str(tmp_path / "nothing.png"),
        paths[1],
        str(tmp_path / "cut.png"),
        str(tmp_path),
        None,
        paths[2],
    ]
    table = explainer()({"path": names})
    assert table.schema == Explainer.schema
    rows = table.to_pylist()
    assert [bool(row["error"]) for row in rows] == [False, True, False, True, True, True, False]
    assert all(row["heat"] is row["width"] is row["target"] is None for row in rows if row["error"])
    for row, other in zip((rows[0], rows[2], rows[6]), expected, strict=True):
        assert {**row, "heat": None, "probability": None} == {**other, "heat": None, "probability": None}
        np.testing.assert_allclose(*(np.frombuffer(x["heat"], "<f2") for x in (row, other)), atol=2e-3)


def test_an_image_whose_heatmap_fails_does_not_stop_the_others(paths):
    class Fails(va.maps.Rollout):
        def explain(self, model, images_BCHW, target):
            if (images_BCHW[:, 0, 0, 0] == images_BCHW.new_tensor(self.bad)).any():
                raise va.errors.DataError("this image cannot be explained")
            return super().explain(model, images_BCHW, target)

    method = Fails()
    method.bad = float(PREPROCESS(np.asarray(Image.open(paths[1])))[0][0, 0, 0])
    stretched = Preprocess(160, fit="stretch")
    method.bad = float(stretched(np.asarray(Image.open(paths[1])))[0][0, 0, 0])
    rows = explainer(method=method, preprocess=stretched)({"path": paths}).to_pylist()
    assert [row["error"] for row in rows] == [None, "this image cannot be explained", None]


@pytest.mark.parametrize(
    "columns", [{"path": []}, {"bytes": [], "path": []}, pa.table({"path": pa.array([], pa.string())})]
)
def test_an_empty_batch_is_an_empty_table_of_the_same_columns(columns):
    table = explainer()(columns)
    assert table.num_rows == 0
    assert table.schema == Explainer.schema


def test_parts_with_and_without_values_fit_together_in_parquet(paths, tmp_path):
    explain = explainer(save=["overlay"])
    for number, names in enumerate((paths, ["missing.png"], [])):
        pa.parquet.write_table(explain({"path": names}), tmp_path / f"{number}.parquet")
    assert pa.parquet.read_table(tmp_path).num_rows == 4


def test_another_process_loads_the_model_once_and_gives_the_same_rows(paths, tmp_path):
    explain = Explainer(partial(make_and_note, tmp_path / "made"), method="rollout", preprocess=PREPROCESS)
    expected = [explain({"path": [path]}) for path in paths]
    assert len(pickle.dumps(explain)) < 10_000  # without the model
    with ProcessPoolExecutor(1, mp_context=get_context("forkserver")) as pool:
        found = list(pool.map(explain, [{"path": [path]} for path in paths]))
    for ours, theirs in zip(expected, found, strict=True):
        assert ours.schema == theirs.schema
        assert ours.drop(["heat", "probability"]).equals(theirs.drop(["heat", "probability"]))
    assert (tmp_path / "made").read_text() == "made\n" * 2  # here, and there once for three batches


def test_rows_without_overlay_are_small(paths):
    table = explainer()({"path": paths})
    assert table.nbytes / table.num_rows < 1_000


def test_wrong_arguments_are_errors(paths):
    refuses(UsageError, "save has 'heatmap'; it can have heat and overlay", lambda: explainer(save=["heatmap"]))
    refuses(UsageError, "needs a column path or bytes, got name", lambda: explainer()({"name": paths}))
    refuses(UsageError, "gaze", lambda: explainer(method="gaze")({"path": paths}))
    refuses(UsageError, "'cuba' cannot be used", lambda: explainer(device="cuba")({"path": paths}))
    refuses(UsageError, "returned a int; return a torch Module", lambda: Explainer(lambda: 3)({"path": paths}))
