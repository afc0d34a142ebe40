"""The file of figures that `visionattn score` writes, and its choice of images."""

import json

import numpy as np

from tests.commands.scores import SCORES
from visionattn.commands.scorecard import write


def test_the_images_are_taken_evenly():
    from visionattn.commands.scorecard import evenly

    assert evenly(10, 5) == [0, 2, 4, 6, 8]
    assert evenly(3, 200) == [0, 1, 2]
    assert np.bincount(np.array(evenly(1000, 200)) // 100).tolist() == [20] * 10


def test_a_new_file_of_figures_replaces_the_old_one(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("older figures")
    write(str(path), SCORES)
    assert json.loads(path.read_text())["of_images"]["raw"]["deletion"] == SCORES.values["raw"]["deletion"].tolist()
