"""The verbs `fit`, `validate`, `test` and `predict`: Lightning's command line."""

import argparse
import os
import sys


def parser(verb: str) -> argparse.ArgumentParser:
    """Build the parser of one of Lightning's verbs."""
    from visionattn.training import parser_of

    return parser_of(verb)


def run(arguments: list[str]) -> int:
    """Run one of Lightning's verbs and return the exit code 0.

    Args:
        arguments: the command line after `visionattn`; its first word is the verb.

    Raises:
        UsageError, DataError: see `training.run_verb`.
    """
    from visionattn.training import run_verb

    if (folder := os.getcwd()) not in sys.path:  # a config may name classes of modules in the current folder
        sys.path.append(folder)
    run_verb(arguments[0], arguments[1:])
    return 0
