"""What a user did that cannot work, told in one sentence: what, where, and what to do."""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A wrong name, flag or pairing; the command line ends with exit code 2."""


class DataError(ValueError):
    """A file, folder or checkpoint that cannot be used; the command line ends with exit code 1."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Say which of `names` come nearest to a mistyped `name`: `" Nearest: a, b."`, or `""` where none is near."""
    close = difflib.get_close_matches(name, list(names), n=count, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else ""


class MapWarning(UserWarning):
    """A heatmap was made, but there is a reason to doubt it."""


def warn(message: str) -> None:
    import warnings

    warnings.warn(message, MapWarning, stacklevel=4)
