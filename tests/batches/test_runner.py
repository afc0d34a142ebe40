"""The model of a batch runner is an object, a function, a checkpoint or a name; pools and engines call the runner."""

import json
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import timm
import torch

from tests.batches.pictures import make_model, write_pictures
from tests.conftest import CONFIGS
from tests.refusals import refuses
from visionattn.batches import Explainer, Predictor
from visionattn.data import Preprocess
from visionattn.errors import UsageError

RAY = """
import json, sys
import ray
from tests.batches.pictures import make_model
from visionattn.batches import Explainer
from visionattn.data import Preprocess

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
rows = ray.data.from_items([{"path": path} for path in json.loads(sys.argv[1])]).map_batches(
    Explainer, fn_constructor_args=[make_model], fn_constructor_kwargs={"preprocess": Preprocess(160)},
    batch_size=2, concurrency=1, num_cpus=1,
)
rows.write_parquet(sys.argv[2])
"""


def test_a_checkpoint_predicts_with_its_own_preprocessing_and_names(quick_run, tmp_path):
    checkpoint = quick_run / "best.ckpt"
    rows = Predictor(checkpoint)({"path": [str(path) for path in write_pictures(tmp_path)]}).to_pylist()
    assert [row["error"] for row in rows] == [None] * 3
    assert all(row["class"] is not None for row in rows)


def test_a_name_is_a_model_of_that_name(tmp_path, monkeypatch):
    asked = []

    def load(name):
        asked.append(name)
        return make_model()

    monkeypatch.setattr("visionattn.batches.runner.load_model", load)
    predict = Predictor("resnet50", preprocess=Preprocess(160))
    paths = [str(path) for path in write_pictures(tmp_path)]
    first, second = predict({"path": paths}), predict({"path": paths})
    assert first.equals(second)
    assert asked == ["resnet50"]


@pytest.mark.slow
def test_ray_writes_the_rows_of_the_runner(tmp_path):
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'visionattn[ray]'")
    import pyarrow.parquet

    paths = [str(path) for path in write_pictures(tmp_path / "in", 5)]
    command = [sys.executable, "-c", RAY, json.dumps([*paths, "missing.png"]), str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(CONFIGS.parent)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {row["path"]: row for row in pyarrow.parquet.read_table(tmp_path / "out").to_pylist()}
    expected = Explainer(make_model, preprocess=Preprocess(160))({"path": [*paths, "missing.png"]}).to_pylist()
    assert len(found) == 6
    for row in expected:
        theirs = found[row["path"]]
        assert {**theirs, "heat": None, "probability": None} == {**row, "heat": None, "probability": None}
        if row["heat"]:
            heat, other = (np.frombuffer(x["heat"], "<f2") for x in (row, theirs))
            np.testing.assert_allclose(heat, other, atol=2e-3)


def test_a_given_model_is_copied_and_a_process_keeps_the_models_used_last(tmp_path):
    model, paths = make_model().train(), [str(path) for path in write_pictures(tmp_path, 1)]
    predict = Predictor(model, preprocess=Preprocess(160))
    before = predict({"path": paths})
    with torch.no_grad():
        model.network.head.weight.mul_(-1)
    assert predict({"path": paths}).equals(before)
    assert model.training
    made = []

    def make(number):
        made.append(number)
        return make_model()

    others = [Predictor(partial(make, number), preprocess=Preprocess(160)) for number in range(5)]
    for number in (0, 1, 2, 3, 0, 4, 0, 1):
        others[number]({"path": paths})
    assert made == [0, 1, 2, 3, 4, 1]


def test_calls_that_no_row_is_to_blame_for_raise(tmp_path):
    paths = {"path": [str(path) for path in write_pictures(tmp_path, 2)], "target": [0, 1]}
    refuses(UsageError, "gaze", lambda: Explainer(make_model, method="gaze", preprocess=Preprocess(160))(paths))
    horse = Explainer(make_model, target="horse", preprocess=Preprocess(160))
    refuses(UsageError, "horse", lambda: horse(paths))
    one = timm.create_model("test_vit", num_classes=1)
    refuses(UsageError, "no scores of classes", lambda: Predictor(one)(paths))
    if not torch.cuda.is_available():
        refuses(UsageError, "'cuda' cannot be used", lambda: Predictor(make_model, device="cuda")(paths))
