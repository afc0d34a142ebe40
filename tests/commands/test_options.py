"""Options that several verbs share: wrong values are errors, and help texts name the defaults."""

import argparse
import importlib
import re

import pytest

from tests.commands.command_line import fails
from visionattn.cli import _VERBS


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
        (["--ckpt", "a", "--weights", "b"], 2, ["--weights needs --model"]),
        (["--compare", "a", "b", "--weights", "c"], 2, ["--weights needs --model"]),
        (["--ckpt", "a", "--batchsize", "3"], 2, ["no option --batchsize", "--batch-size"]),
        ([], 2, ["--ckpt", "--model", "required"]),
    ],
)
def test_error_names_the_wrong_model_method_or_option(flags, code, parts, photo_folder, tmp_path, capsys):
    command = ["overlay", "--images", str(photo_folder / "class0"), "--out", str(tmp_path / "out"), *flags]
    fails(command, code, *parts, capsys=capsys)
    assert not (tmp_path / "out").exists()


OWN = [verb for verb, (module, _) in _VERBS.items() if not module.endswith(".train")]
"""Verbs with a parser of visionattn. The other verbs have Lightning's parser, which writes its own help."""


def options_of(parser):
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                yield from options_of(subparser)
        elif not isinstance(action, argparse._HelpAction):
            yield action


@pytest.mark.parametrize("verb", OWN)
def test_help_of_every_option_ends_with_its_default_or_required(verb):
    parser = importlib.import_module(_VERBS[verb][0]).parser(verb)
    options = list(options_of(parser))
    assert options
    for option in options:
        assert re.search(r"\((required|default: .+)\)$", option.help), option.option_strings
        assert option.required == option.help.endswith("(required)") or "one of --ckpt" in option.help
        takes_value = option.nargs != 0
        assert not takes_value or option.choices or option.metavar, option.option_strings
