"""`visionattn data check` lists and counts the problems of a data set."""

import os
import subprocess
import sys
from collections import Counter

import numpy as np

from tests.data.annotated import coco, voc, yolo
from tests.data.annotations.spoiled import spoiled
from visionattn.cli import main
from visionattn.data.annotations.checks import check

SPOILED = {
    "not finite": 4, "inverted": 1, "empty": 2, "outside": 1, "over the edge": 1, "duplicate box": 1,
    "unknown class": 1, "unknown image": 1, "missing image": 1, "unreadable image": 1, "wrong size": 1,
    "listed twice": 1, "twin": 1, "leak": 1,
}  # fmt: skip
"""Kind of problem → number of problems in the data set of `spoiled`."""


def test_every_bad_box_and_image_is_counted(tmp_path, capsys):
    root = spoiled(coco(tmp_path))
    report = check(root)
    assert Counter(problem.kind for problem in report.problems) == SPOILED
    first = report.splits["train"][0]
    # the last box was clipped to the image
    np.testing.assert_array_equal(first.boxes, [[5, 6, 25, 36], [40, 10, 79, 50], [70, 50, 80, 60]])
    assert main(["data", "check", str(root), "--limit", "2"]) == 1
    printed = capsys.readouterr().out
    for kind, count in SPOILED.items():
        assert f"{count} {kind}: " in printed
    assert "… and 2 more" in printed
    assert "train_0.png: box 3 (nan, 2, nan, 11)" in printed
    assert "train  7 images, 3 without boxes; 9 good boxes: cat 4, dog 3, eel 2" in printed


def test_clean_data_has_no_problems_and_a_missing_folder_is_an_error(tmp_path, capsys):
    assert main(["data", "check", str(voc(tmp_path))]) == 0
    assert "no problems" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "nothing")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_names_that_a_terminal_cannot_show_are_escaped(tmp_path):
    root = yolo(tmp_path / "data")
    (root / "data.yaml").write_text("train: images/train\nval: images/val\nnames: [çat, dog, eel]\n", encoding="utf-8")
    (root / "images" / "train" / "train_2.png").rename(root / "images" / "train" / os.fsdecode(b"caf\xe9.png"))
    (root / "labels" / "train" / os.fsdecode(b"caf\xe9.txt")).write_text("0 nan .5 .1 .1\n")
    command = [sys.executable, "-m", "visionattn", "data", "check", str(root)]
    for encoding, expected in (("ascii", b"\\xe7at 3"), ("utf-8", "çat 3".encode())):
        process = subprocess.run(
            command, capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding + ":strict"}
        )
        assert process.returncode == 1, process.stderr
        assert expected in process.stdout
        assert b"caf\\udce9.txt: box 1 (nan" in process.stdout


def test_wrong_calls_of_data_check_are_errors(tmp_path, capsys):
    root = str(yolo(tmp_path))
    assert main(["data", "check", root, "--limit", "0"]) == 2
    assert main(["data", "check", root, "--images", "nothing"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "error: --limit must be at least 1, got 0",
        "error: there is no folder of images nothing",
    ]
