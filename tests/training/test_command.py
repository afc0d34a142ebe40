"""Shipped configs are found from any folder."""

from pathlib import Path

from tests.commands.command_line import QUICKSTART


def test_a_config_is_found_from_anywhere(tmp_path, monkeypatch):
    from visionattn.training.command import find_configs

    monkeypatch.chdir(tmp_path)
    (found,) = find_configs(["--config=configs/quickstart.yaml"])
    assert Path(found.removeprefix("--config=")).read_text() == Path(QUICKSTART).read_text()
