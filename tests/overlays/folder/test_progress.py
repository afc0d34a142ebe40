"""The progress bar and the summary of an export."""

import io
import re

import pytest
from rich.console import Console

from visionattn.overlays.folder.manifest import Done
from visionattn.overlays.folder.progress import ProgressBar, Summary, print_summary


def printed(summary):
    text = io.StringIO()
    print_summary(Console(file=text, width=200), summary)
    return text.getvalue()


def test_the_bar_shows_the_rate_the_remaining_time_and_the_failures(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("visionattn.overlays.folder.progress.time.perf_counter", lambda: clock[0])
    text = io.StringIO()
    with ProgressBar(Console(file=text, width=120, force_terminal=True), "seen", 20) as bar:
        clock[0] += 10
        bar.advance({"done": 5, "failed": 1, "frames": 30})
    line = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", text.getvalue()).splitlines()[-1]
    assert "seen/" in line
    assert "4/50  0.5 images/s  1:30 left  1 failed" in line


def entry(name, **more):
    return Done(name, (0, 0), "", {}, {"peak": [1, 2], "method": "gradcam", "layer": "layer4", **more})


def test_the_summary_lists_the_images_in_which_two_models_differ_most():
    summary = Summary(out="seen")
    for number in range(9):
        summary.count(entry("x", difference={"mean": number / 10, "peak": None}), f"{number}.jpg")
    lines = printed(summary).splitlines()
    assert lines[0].split() == ["9", "overlays", "seen/", "heatmaps:", "gradcam,", "layer4"]
    assert [line.split()[-2:] for line in lines[1:4]] == [["0.80", "8.jpg"], ["0.70", "7.jpg"], ["0.60", "6.jpg"]]


def test_the_summary_shows_one_warning_of_each_kind():
    summary = Summary(out="seen", written=1)
    kinds = ["{} tokens after blocks.2", "approximate", "4th kind of {}", "fifth kind"]
    for number in range(9):
        for kind in kinds:
            summary.warn(kind.format(f"{number}.5"))
    lines = [line.split("warning") for line in printed(summary).splitlines()]
    assert [line[1].strip() for line in lines if len(line) == 2] == [
        "0.5 tokens after blocks.2",
        "approximate",
        "4th kind of 0.5",
    ]


@pytest.mark.parametrize(("noun", "count", "expected"), [("overlay", 1, "1 overlay "), ("image", 2, "2 images ")])
def test_the_summary_counts_the_outputs_with_singular_and_plural(noun, count, expected):
    summary = Summary(out="seen", noun=noun)
    for _ in range(count):
        summary.count(entry("x"), "x")
    assert expected in printed(summary)


@pytest.mark.parametrize("terminal", [False, True])
def test_an_output_that_is_no_terminal_gets_a_line_a_minute(terminal, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("visionattn.overlays.folder.progress.time.perf_counter", lambda: clock[0])
    text = io.StringIO()
    with ProgressBar(Console(file=text, width=120, force_terminal=terminal), "[in] seen", 1000) as bar:
        for done in range(1, 150):
            clock[0] += 1
            bar.advance({"done": done, "failed": done // 50})
    lines = [line for line in text.getvalue().splitlines() if line.startswith("  [in] seen/ ") and "━" not in line]
    expected = ["60/1000  1.0 images/s  15:39 left  1 failed", "120/1000  1.0 images/s  14:38 left  2 failed"]
    assert lines == ([] if terminal else [f"  [in] seen/ {line}" for line in expected])
