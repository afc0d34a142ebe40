"""Overlays during training."""

from tests.commands.command_line import QUICKSTART, fails
from tests.conftest import SMALL


def test_a_method_that_does_not_fit_is_refused_before_the_first_epoch(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--model.network.attention=visionattn.attention.ECA", *SMALL]
    fails(["fit", "--config", QUICKSTART, *flags], 2, "gates over channels only", "Methods that fit", capsys=capsys)
    assert not list(tmp_path.rglob("*.ckpt"))
