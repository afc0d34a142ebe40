"""The verbs `fit`, `validate`, `test` and `predict`: Lightning's command line."""

import argparse


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of one of Lightning's verbs."""
    from visionattn.training.command import parser_of

    return parser_of(verb)


def run(arguments: list[str]) -> int:
    """Run a command line, whose first word is the verb, and return the exit code."""
    from visionattn.training import command

    command.run(arguments[0], arguments[1:])
    return 0
