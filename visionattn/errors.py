"""The two errors that users see, and the warning about doubtful heatmaps.

Each message is one sentence: what is wrong, where, and what to do.
"""

import difflib
from collections.abc import Iterable


class UsageError(ValueError):
    """A wrong name, argument or combination of arguments. The command line exits with code 2."""


class DataError(ValueError):
    """A file, folder or checkpoint that cannot be used. The command line exits with code 1."""


def nearest(name: str, names: Iterable[str], count: int = 3) -> str:
    """Suggest the names most similar to a mistyped one, as the end of an error message.

    Args:
        name: the mistyped name.
        names: the valid names.
        count: largest number of suggestions.

    Returns:
        `" Nearest: a, b."`, or `""` if no name is similar.
    """
    close = difflib.get_close_matches(name, list(names), n=count, cutoff=0.5)
    return f" Nearest: {', '.join(close)}." if close else ""


class MapWarning(UserWarning):
    """A heatmap was computed, but there is a reason to doubt it."""


def warn(message: str) -> None:
    """Emit a MapWarning that points at the line in which the user called the method."""
    import warnings

    warnings.warn(message, MapWarning, stacklevel=4)
