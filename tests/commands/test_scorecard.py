"""The file of figures that `visionattn score` writes, and the images that it takes."""

import json

import numpy as np

from tests.commands.scores import SCORES
from visionattn.commands.scorecard import write


def test_the_images_are_taken_evenly():
    from visionattn.commands.scorecard import evenly

    assert evenly(10, 5) == [0, 2, 4, 6, 8]
    assert evenly(3, 200) == [0, 1, 2]
    assert np.bincount(np.array(evenly(1000, 200)) // 100).tolist() == [20] * 10


def test_a_newer_file_takes_the_place_of_an_older_one(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("older figures")
    write(str(path), SCORES)
    assert json.loads(path.read_text())["of_images"]["raw"]["deletion"] == SCORES.values["raw"]["deletion"].tolist()
