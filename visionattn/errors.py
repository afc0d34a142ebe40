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


def first_line(error: Exception) -> str:
    """Return the first line of an error, with the second if the first ends in a colon; its class if it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


class MapWarning(UserWarning):
    """A heatmap was computed, but there is a reason to doubt it."""


class BlankMapWarning(MapWarning):
    """A heatmap is constant, so it shows nothing."""


def warn(message: str, category: type[MapWarning] = MapWarning) -> None:
    """Emit a warning that points at the line in which the user called the method."""
    import warnings

    warnings.warn(message, category, stacklevel=4)
