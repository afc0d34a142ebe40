"""`visionattn score` writes a file of scores, chooses images, and prints expected times."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from tests.commands.scores import SCORES
from tests.refusals import refuses
from visionattn.commands import scorecard
from visionattn.commands.scorecard import images_of_config, write
from visionattn.data import Preprocess
from visionattn.errors import DataError


def test_images_are_chosen_at_equal_intervals():
    from visionattn.commands.scorecard import evenly

    assert evenly(10, 5) == [0, 2, 4, 6, 8]
    assert evenly(3, 200) == [0, 1, 2]
    assert np.bincount(np.array(evenly(1000, 200)) // 100).tolist() == [20] * 10


def test_labels_in_another_order_of_classes_are_changed_to_the_order_of_the_model(photo_folder, tmp_path, capsys):
    names = [f"class{number}" for number in range(5)]
    (tmp_path / "config.yaml").write_text(
        f"data: {{class_path: visionattn.data.ImageFolderData, init_args: {{root: {photo_folder}, num_workers: 0}}}}"
    )

    def labels(class_names):
        images = images_of_config(str(tmp_path / "config.yaml"), Preprocess(), class_names, count=9, batch_size=9)
        return [int(label) for batch in images for label in batch["label"]]

    assert labels(names[::-1]) == [4 - label for label in labels(names)]
    assert "matched by name" in capsys.readouterr().err
    refuses(DataError, "the data has no 'cat' and the model has no 'class4'", labels, [*names[:4], "cat"])


def test_a_new_file_of_figures_replaces_the_old_one(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text("older figures")
    write(str(path), SCORES)
    assert json.loads(path.read_text())["of_images"]["raw"]["deletion"] == SCORES.values["raw"]["deletion"].tolist()


@pytest.mark.parametrize("terminal", [False, True])
def test_expected_time_is_printed_before_the_scores_and_the_remaining_time_once_a_minute(terminal, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(scorecard.time, "monotonic", lambda: clock[0])

    def slow(*arguments, advance, expect, **options):
        expect({"scorecam": 18.0, "raw": 0.5, "controls": 1.0})
        for _ in range(80):  # a quarter of an image in five seconds
            clock[0] += 5
            advance(0.25)
        return SCORES

    monkeypatch.setattr(scorecard, "score", slow)
    text = io.StringIO()
    console = Console(file=text, width=120, force_terminal=terminal)
    scorecard.scorecard(None, scorecard.Images([], 40), None, steps=2, batch_size=1, seed=0, console=console)
    lines = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue()).splitlines()
    announced = "  about 0:13:00 for 40 images, of which scorecam takes 0:12:00; fewer --images take less time"
    assert next(line for line in lines if line.strip() and "━" not in line) == announced
    minutes = [line for line in lines if line.endswith(" left")]
    assert len(minutes) == (0 if terminal else 6)
    assert terminal or minutes[0] == "  scoring 3.0/40 images, 0:12:20 left"


def test_short_times_are_not_announced(capsys):
    scorecard._print_estimate(Console(), {"raw": 0.1, "controls": 0.2}, 30)
    assert capsys.readouterr().out == ""
