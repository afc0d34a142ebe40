"""Typos in configs are named."""

from pathlib import Path

from tests.commands.command_line import QUICKSTART, fails


def test_typos_in_a_file_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "typo.yaml"
    config.write_text(Path(QUICKSTART).read_text().replace("num_classes", "num_classe"))
    fails(["fit", "--config", str(config)], 2, "no option 'num_classe'", "Nearest: num_classes", capsys=capsys)
    config.write_text("trainer: {max_epochs: 1\n")
    fails(["fit", "--config", str(config)], 2, "Problems parsing config", capsys=capsys)
    fails(["fit", "--config", "nothing.yaml"], 2, "there is no config", "nothing.yaml", capsys=capsys)
    fails(["fit", "--config", "configs/quikstart.yaml"], 2, "Nearest: configs/quickstart.yaml", capsys=capsys)
    fails(["fti"], 2, "no verb 'fti'", "Nearest: fit", capsys=capsys)
