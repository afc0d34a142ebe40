"""Test that the errors for wrong configs name the mistake and the nearest valid name."""

from pathlib import Path

from tests.commands.command_line import QUICKSTART, fails

WRONG_YAML = {
    b"trainer: {max_epochs: 1\n": "line 2, column 1 is not valid YAML: expected",
    b"trainer:\n\tmax_epochs: 1\n": "line 2, column 1 is not valid YAML: found character '\\t'",
    b"\xff\xfe": "is not valid YAML: 'utf-8' codec can't decode",
    b"- 3\n": "holds no sections such as `trainer:`, but list",
}


def test_typos_in_configs_and_file_names_and_verbs_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    config = tmp_path / "typo.yaml"
    config.write_text(Path(QUICKSTART).read_text().replace("num_classes", "num_classe"))
    fails(["fit", "--config", str(config)], 2, "no option 'num_classe'", "Nearest: num_classes", capsys=capsys)
    for content, reason in WRONG_YAML.items():
        config.write_bytes(content)
        fails(["fit", "--config", QUICKSTART, f"--config={config}"], 2, str(config), reason, capsys=capsys)
    fails(["fit", "--modle.network.depth=2"], 2, "no option modle.network.depth. Nearest: model.", capsys=capsys)
    fails(["fit", "--config", "nothing.yaml"], 2, "there is no config", "nothing.yaml", capsys=capsys)
    fails(["fit", "--config", "configs/quikstart.yaml"], 2, "Nearest: configs/quickstart.yaml", capsys=capsys)
    fails(["fti"], 2, "no verb 'fti'", "Nearest: fit", capsys=capsys)
