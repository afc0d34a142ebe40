"""The next run continues an export that was killed or interrupted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.overlays.folder.exports import bright, contents, manifest, overlays, photos, run, snapshot
from visionattn.drawing import Style

KILLED = """
import os, signal, sys
from pathlib import Path
import tests.overlays.folder.exports as t
from visionattn.drawing import Style

def die(): os.kill(os.getpid(), signal.SIGKILL)

def after(count, act):  # call `act` at the call after the first `count` calls, and at every later one
    calls = []
    def counted(*args, **kwargs):
        calls.append(1)
        return act(*args, **kwargs) if len(calls) > count else None
    return counted

def in_the_method(folder):
    die_later = after(3, lambda: die())
    def method(*args, **kwargs):
        die_later()
        return t.bright(*args, **kwargs)
    method.__qualname__, method.__module__ = t.bright.__qualname__, t.bright.__module__
    return {"method": method}

def written_but_not_listed(folder):
    replace, die_later = os.replace, after(3, lambda: die())
    def replace_and_die(source, target):
        replace(source, target)
        die_later()
    os.replace = replace_and_die
    return {}

def half_written(folder):
    die_later = after(3, lambda handle: (os.ftruncate(handle, 100), die()))
    os.fsync = lambda handle: ".part" in os.readlink(f"/proc/self/fd/{handle}") and die_later(handle)
    return {}

for name in sys.argv[2:]:  # in forks, so that torch is imported only once
    child = os.fork()
    if child == 0:
        folder, (way, alpha) = Path(sys.argv[1]), name.split(",")
        t.run([folder / "in"], folder / name, style=Style(alpha=float(alpha)), **globals()[way](folder))
        os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL, name
"""
WAYS = ["in_the_method", "written_but_not_listed", "half_written"]


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """Output folders of killed runs, named `way,alpha`. Most had outputs of an earlier run with another alpha."""
    root = tmp_path_factory.mktemp("killed")
    photos(root / "in", 11)
    run([root / "in"], root / "whole")
    ways = {f"{way},0.75": Style(alpha=0.1) for way in WAYS[1:]} | {f"{way},0.1": Style() for way in WAYS[1:]}
    for out, style in ways.items():
        run([root / "in" / f"{number}.png" for number in range(6)], root / out, style=style)
    process = subprocess.run(
        [sys.executable, "-c", KILLED, str(root), "in_the_method,0.75", *ways],
        cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    return root


@pytest.mark.parametrize("way", WAYS)
def test_the_next_run_keeps_the_listed_outputs_of_a_killed_run_and_makes_the_others(killed, way):
    out = killed / f"{way},0.75"
    lines = [json.loads(line) for line in (out / "manifest.jsonl").read_bytes().splitlines()]
    fingerprint = manifest(killed / "whole")["0.png"]["fingerprint"]
    kept = {entry["outputs"]["overlay"] for entry in lines if entry["fingerprint"] == fingerprint}
    assert len(kept) < 11
    assert kept or way != "in_the_method"
    before = snapshot(out)
    summary = run([killed / "in"], out)
    assert (summary.skipped, summary.written, summary.failed) == (len(kept), 11 - len(kept), 0)
    assert all(snapshot(out)[out / name] == before[out / name] for name in kept)
    assert contents(out) == contents(killed / "whole")
    assert len(manifest(out)) == 11
    assert not (out / ".manifest.promised").exists()


@pytest.mark.parametrize("way", WAYS[1:])
def test_outputs_that_a_killed_run_may_have_replaced_are_made_again(killed, way):
    out = killed / f"{way},0.1"
    whole = contents(killed / "whole")
    # other threads of the killed run may have left unfinished files, which are not in `whole`
    found = {name: content for name, content in contents(out).items() if name in whole}
    assert way == "half_written" or any(content != whole[name] for name, content in found.items())
    run([killed / "in"], out)
    assert contents(out) == whole


def test_ctrl_c_keeps_the_finished_outputs(tmp_path):
    photos(tmp_path / "in", 20)
    calls = []

    def interrupt_fifth_call(*args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return bright(*args, **kwargs)

    interrupt_fifth_call.__qualname__, interrupt_fifth_call.__module__ = bright.__qualname__, bright.__module__
    with pytest.raises(KeyboardInterrupt):
        run([tmp_path / "in"], tmp_path / "out", method=interrupt_fifth_call)
    finished = overlays(tmp_path / "out")
    assert {entry["outputs"]["overlay"] for entry in manifest(tmp_path / "out").values()} == finished
    assert run([tmp_path / "in"], tmp_path / "out").skipped == len(finished) > 0
    assert len(overlays(tmp_path / "out")) == 20
