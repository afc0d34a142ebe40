"""The verb `completion`: print a shell's completion script for verbs, options and values."""

import argparse
import importlib
from collections.abc import Mapping

from visionattn.commands.options import Parser
from visionattn.errors import UsageError, nearest

SHELLS = ("bash", "zsh", "fish")

_USAGE = """Print the script with which a shell completes verbs, options and values:

  bash   visionattn completion bash > ~/.local/share/bash-completion/completions/visionattn
  zsh    visionattn completion zsh > ~/.zfunc/_visionattn     (before compinit in ~/.zshrc: fpath+=(~/.zfunc))
  fish   visionattn completion fish > ~/.config/fish/completions/visionattn.fish"""


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of `visionattn completion`."""
    parser = Parser(prog=f"visionattn {verb}", description=_USAGE, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shell", metavar="SHELL", help="name of the shell: bash, zsh or fish (required)")
    return parser


def run(arguments: list[str], verbs: Mapping[str, tuple[str, str]]) -> int:
    """Print the completion script of a shell and return the exit code.

    Args:
        arguments: the command line after `visionattn`; its first word is the verb.
        verbs: verb → (module with the verb's parser, one-line description of the verb).

    Raises:
        UsageError: the shell is not one of `SHELLS`.
    """
    shell = parser(arguments[0]).parse_args(arguments[1:]).shell
    if shell not in SHELLS:
        raise UsageError(
            f"there is no completion script for {shell!r}; choose one of {', '.join(SHELLS)}.{nearest(shell, SHELLS)}"
        )

    import shtab

    print(shtab.complete(_root(verbs), shell))
    if shell == "bash":  # shtab's own `complete` line lacks -o default, so bash would never fall back to file names
        print("complete -o default -F _shtab_visionattn visionattn")
    return 0


def _root(verbs: Mapping[str, tuple[str, str]]) -> argparse.ArgumentParser:
    """Build one parser of the whole command line, with a subparser for each verb."""
    root = argparse.ArgumentParser(prog="visionattn")
    root.add_argument("--version", action="version")
    subparsers = root.add_subparsers()
    for verb, (module, text) in verbs.items():
        verb_parser = importlib.import_module(module).parser(verb)
        _add_values(verb_parser)
        subparsers.add_parser(verb, help=text, parents=[verb_parser], add_help=False)
    return root


def _add_values(parser: argparse.ArgumentParser) -> None:
    """Declare the values of each option for shtab: the option's choices, or file names if there are no choices."""
    import shtab

    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for subparser in action.choices.values():
                _add_values(subparser)
        elif isinstance(action.metavar, str) and action.metavar.startswith("{"):
            # jsonargparse lists the values of a bool, an Enum or a Literal in the metavar only
            action.choices, action.metavar = action.metavar.strip("{}").split(","), None
        elif action.nargs != 0 and not action.choices:
            # bash completes file names by itself. With shtab.FILE, bash would offer file names instead of options
            # after `--images a.jpg`. `vars` is used because argparse declares no attribute `complete`.
            vars(action)["complete"] = {**shtab.FILE, "bash": ""}
