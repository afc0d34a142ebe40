"""Test that memory and open files do not grow while one process runs many commands."""

import json

import pytest

from tests.faults.conftest import write_config


@pytest.mark.parametrize(
    ("seconds", "min_turns"), [(0, 4), pytest.param(1800, 20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_memory_and_open_files_stay_flat(seconds, min_turns, server, photo_folder, tmp_path):
    config = write_config(tmp_path, workers=2 if seconds else 0)
    fault = f"soak({str(config)!r}, {str(photo_folder / 'class0')!r}, {seconds}, {min_turns})"
    ended = server.run([], tmp_path, fault=fault, seconds=seconds + 600)
    turns = json.loads(ended.output.splitlines()[-1])
    memory, files = zip(*turns[len(turns) // 4 + 1 :], strict=True)  # the first turns also load libraries
    assert len(turns) >= min_turns
    assert max(files) == min(files)
    growth = (memory[-1] - memory[0]) / len(memory)
    assert growth < (0.5 if seconds else 15), turns  # MB per turn; over a few turns, the allocator's noise dominates
    print(f"{len(turns)} turns: {memory[0]:.0f} MB to {memory[-1]:.0f} MB, {files[0]} open files")
