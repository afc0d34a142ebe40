"""Options that several verbs share."""

import pytest

from tests.commands.command_line import fails


@pytest.mark.parametrize(
    ("flags", "code", "parts"),
    [
        (["--model", "vit_smal_patch16_224"], 2, ["timm has no model 'vit_smal_patch16_224'", "vit_small_patch16_224"]),
        (["--model", "test_vit", "--weights", "random", "--method", "rolout"], 2, ["no method 'rolout'", "rollout"]),
        (["--model", "test_vit", "--weights", "random", "--method", "rollout", "--layer", "x"], 2, ["takes no layer"]),
        (
            ["--model", "test_vit", "--weights", "random", "--method", "raw", "--layer", "blocks.9"],
            2,
            ["blocks.5.attn"],
        ),
        (["--ckpt", "nothing.ckpt"], 1, ["there is no checkpoint nothing.ckpt"]),
        (["--ckpt", "a", "--weights", "b"], 2, ["--weights goes with --model"]),
        (["--ckpt", "a", "--batchsize", "3"], 2, ["no option --batchsize", "--batch-size"]),
        ([], 2, ["--ckpt", "--model", "required"]),
    ],
)
def test_overlay_says_what_is_wrong(flags, code, parts, photo_folder, tmp_path, capsys):
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", str(tmp_path / "out"), *flags]
    fails(command, code, *parts, capsys=capsys)
    assert not (tmp_path / "out").exists()
