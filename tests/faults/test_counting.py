"""Test that any number of processes evaluates every image exactly once, with equal metrics."""

import csv
import itertools
import json

import pytest

from tests.faults.conftest import DETECTION, start_all, write_config

QUICK = [("test", 1, 2), ("test", 13, 2), ("predict", 1, 2), ("predict", 13, 2)]  # (verb, images, processes)
ALL = [(*case, count) for case in itertools.product(("test", "predict"), (1, 2, 3, 13, 17)) for count in (2, 3)]


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    """Train one epoch; return the config and the checkpoint."""
    home = tmp_path_factory.mktemp("trained")
    config = write_config(home)
    ended = server.run(["fit", "--config", config, "--trainer.max_epochs=1"], home)
    assert ended.code == 0, ended.output
    return config, home / "runs" / "tiny" / "0" / "best.ckpt"


def run_of(server, count, command, home):
    """Run a command in `count` processes; return the run's folder, in which no temporary file may be left."""
    home.mkdir()
    children = start_all(server, count, command, home) if count > 1 else [server.start(command, home)]
    for ended in [child.wait() for child in children]:
        assert ended.code == 0, ended.output
    (run,) = (home / "runs" / "tiny").iterdir()
    assert not list(run.glob(".*part*"))
    return run


@pytest.mark.parametrize(  # tests/overlays tests the verb overlay
    ("verb", "images", "processes"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)],
)
def test_every_image_counts_once(verb, images, processes, server, trained, tmp_path):
    config, checkpoint = trained
    command = [verb, "--config", config, f"--ckpt_path={checkpoint}", f"--data.test_size={images}"]
    found = {}
    for count in (1, processes):
        run = run_of(server, count, command, tmp_path / str(count))
        with open(run / ("test.csv" if verb == "test" else "predictions.csv")) as file:
            found[count] = list(csv.reader(file))
    if verb == "predict":
        assert [row[0] for row in found[1][1:]] == [f"digits/test/{index:06d}.png" for index in range(images)]
        assert [row[:2] for row in found[processes]] == [row[:2] for row in found[1]]
        return
    single, several = ({name: float(value) for name, value in rows[1:]} for rows in (found[1], found[processes]))
    assert single.keys() == several.keys() >= {"loss", "accuracy", "top5", "f1", "calibration_error", "pointing"}
    assert several == pytest.approx(single, abs=1e-6)


QUICK_BOXES = [("test", 1, 2), ("test", 5, 2), ("predict", 1, 2), ("predict", 5, 2)]
ALL_BOXES = itertools.product(("test", "predict"), ((1, 2), (5, 2), (2, 3), (13, 3), (17, 2)))


@pytest.mark.parametrize(
    ("verb", "images", "processes"),
    [
        *QUICK_BOXES,
        *(
            pytest.param(verb, *case, marks=pytest.mark.slow)
            for verb, case in ALL_BOXES
            if (verb, *case) not in QUICK_BOXES
        ),
    ],
)
def test_every_image_with_boxes_counts_once_in_the_order_of_the_data(verb, images, processes, server, tmp_path):
    command = [verb, "--config", write_config(tmp_path, model=DETECTION), "--ckpt_path=untrained"]
    command += [f"--data.test_size={images}"]
    found = {}
    for count in (1, processes):
        run = run_of(server, count, command, tmp_path / str(count))
        if verb == "test":
            with open(run / "test.csv") as file:
                found[count] = {name: float(value) for name, value in list(csv.reader(file))[1:]}
        else:
            found[count] = json.loads((run / "predictions.json").read_text())
            assert len(list((run / "predictions").iterdir())) == images
    single, several = found[1], found[processes]
    if verb == "test":
        assert images == 1 or single["mar_100"] > 0
        assert several == pytest.approx(single, abs=1e-6)
        return
    assert list(dict.fromkeys(result["image_id"] for result in single)) == list(range(images))
    assert [result["image_id"] for result in several] == [result["image_id"] for result in single]
    for expected, result in zip(single, several, strict=True):
        assert expected["bbox"] == pytest.approx(result["bbox"], abs=0.011)
