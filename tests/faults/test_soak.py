"""Memory and open files stay constant over hours of work in one process."""

import json

import pytest

from tests.faults.conftest import tiny


@pytest.mark.parametrize(
    ("seconds", "least"), [(0, 4), pytest.param(1800, 20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
)
def test_memory_and_open_files_stay_flat(seconds, least, server, photo_folder, tmp_path):
    config = tiny(tmp_path, workers=2 if seconds else 0)
    fault = f"soak({str(config)!r}, {str(photo_folder / 'class0')!r}, {seconds}, {least})"
    ended = server.run([], tmp_path, fault=fault, seconds=seconds + 600)
    turns = json.loads(ended.output.splitlines()[-1])
    memory, files = zip(*turns[len(turns) // 4 + 1 :], strict=True)  # after what the first turns load once
    assert len(turns) >= least
    assert max(files) == min(files)
    growth = (memory[-1] - memory[0]) / len(memory)
    assert growth < (0.5 if seconds else 15), turns  # MB a turn; of a few turns the allocator's steps are most
    print(f"{len(turns)} turns: {memory[0]:.0f} MB to {memory[-1]:.0f} MB, {files[0]} open files")
