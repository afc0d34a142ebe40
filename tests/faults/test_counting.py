"""Every image exactly once, by however many processes; and the same figures."""

import csv

import pytest

from tests.faults.conftest import start_all, tiny

QUICK = [(1, 2), (13, 2)]
ALL = [(images, processes) for images in (1, 2, 3, 13, 17) for processes in (2, 3)]


@pytest.fixture(scope="module")
def trained(server, tmp_path_factory):
    home = tmp_path_factory.mktemp("trained")
    config = tiny(home)
    ended = server.run(["fit", "--config", config, "--trainer.max_epochs=1"], home)
    assert ended.code == 0, ended.told
    return config, home / "runs" / "tiny" / "0" / "best.ckpt"


@pytest.mark.parametrize(
    ("images", "processes"),
    [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in ALL if case not in QUICK)],
)
@pytest.mark.parametrize("verb", ["test", "predict"])  # overlay shares its images itself, see tests/overlay
def test_every_image_counts_once(verb, images, processes, server, trained, tmp_path):
    config, checkpoint = trained
    command = [verb, "--config", config, f"--ckpt_path={checkpoint}", f"--data.test_size={images}"]
    found = {}
    for count in (1, processes):
        home = tmp_path / str(count)
        home.mkdir()
        children = start_all(server, count, command, home) if count > 1 else [server.start(command, home)]
        for ended in [child.wait() for child in children]:
            assert ended.code == 0, ended.told
        (run,) = (home / "runs" / "tiny").iterdir()
        with open(run / ("test.csv" if verb == "test" else "predictions.csv")) as file:
            found[count] = list(csv.reader(file))
        assert not list(run.glob(".*.part"))
    if verb == "predict":
        assert [row[0] for row in found[1][1:]] == [f"digits/test/{index:06d}.png" for index in range(images)]
        assert [row[:2] for row in found[processes]] == [row[:2] for row in found[1]]
        return
    one, many = ({name: float(value) for name, value in rows[1:]} for rows in (found[1], found[processes]))
    assert one.keys() == many.keys() >= {"loss", "accuracy", "top5", "f1", "calibration_error", "pointing"}
    assert many == pytest.approx(one, abs=1e-6)
