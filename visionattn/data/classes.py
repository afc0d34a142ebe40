"""Class names: find the class that a text means, and match the classes of a model with those of data.

This module does not import torch.
"""

import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path

from visionattn.errors import DataError, nearest
from visionattn.files import local_path

_SHOWN = 5  # names in an error message
_DIGITS = 9  # a number with more digits is no index, and int() refuses very long ones


def class_index(text: str, class_names: Sequence[str], *, remedy: str) -> int:
    """Return the index of a class, given as text on a command line, in a list or in a shard.

    Digits are the index, counted from 0; other text is the name. If a class has a name of digits, e.g. "1", the text 1
    has two readings; it is refused unless both give the same class, or there is no class with this index.

    Args:
        text: a number or a name.
        class_names: in the order of the indices; empty if the names are unknown, then any number is accepted.
        remedy: what to do about a text with two readings, as the end of the error message.

    Raises:
        DataError: there is no such class, or the text has two readings.
    """
    by_name = class_names.index(text) if text in class_names else None
    number = int(text) if text.isdecimal() and len(text) <= _DIGITS else None
    by_number = number if number is not None and (number < len(class_names) or not class_names) else None
    if by_name is not None and by_number is not None and by_name != by_number:
        raise DataError(
            f"{text!r} is either class number {by_number}, which is named {class_names[by_number]!r}, or the name of "
            f"class number {by_name}; {remedy}"
        )
    if by_number is not None:
        return by_number
    if by_name is not None:
        return by_name
    if not class_names:
        raise DataError(f"there is no class {text[:40]!r}, since the classes have no names; give a number, from 0")
    near = nearest(text[:40], class_names)
    shown = ", ".join(class_names[:_SHOWN]) + (", …" if len(class_names) > _SHOWN else "")
    raise DataError(
        f"there is no class {text[:40]!r}.{near or f' The {len(class_names):,} classes are numbered from 0: {shown}.'}"
    )


def match_classes(trained: Sequence[str], found: Sequence[str]) -> list[int] | None:
    """Match the classes of data by name with the classes that a model was trained on.

    Args:
        trained: class names of the model, in the order of its outputs; empty if unknown.
        found: class names of the data, in the order of its labels; empty if unknown.

    Returns:
        For each class of the data, the number of the model's output; None if the order is the same or names are
        unknown.

    Raises:
        DataError: the data has other classes; the message names those that differ.
    """
    if not trained or not found or tuple(trained) == tuple(found):
        return None
    numbers = {name: number for number, name in enumerate(trained)}
    if len(numbers) == len(trained) == len(found) and numbers.keys() == set(found):
        return [numbers[name] for name in found]
    missing, unknown = (
        [name for name in names if name not in others] for names, others in ((trained, found), (found, trained))
    )
    parts = [f"the {side} has no {_listed(names)}" for side, names in (("data", missing), ("model", unknown)) if names]
    raise DataError(
        f"the data has other classes than the model was trained on: {' and '.join(parts) or 'a name occurs twice'}; "
        "use data with the same class names, or train a new model (in Python, first set task.class_names = ())"
    )


def class_names_in(names: str | Sequence[str]) -> Sequence[str]:
    """Return class names: a list as it is, or the lines of a text file, given by its path.

    Spaces at the ends of a line and empty lines at the end of the file are left out.

    Raises:
        DataError: the file cannot be read, or has an empty line between names.
    """
    if not isinstance(names, str):
        return names
    try:
        text = Path(local_path(names)).read_text("utf-8-sig").rstrip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{names} holds no class names: {error}") from error
    lines = [line.strip() for line in text.splitlines()]
    if "" in lines:
        raise DataError(f"{names}, line {lines.index('') + 1}: there is no class name; remove the empty line")
    return lines


def warn_of_similar(names: Sequence[str], where: str) -> None:
    """Warn if class names differ only in upper and lower case, in spaces at the ends, or in how accents are stored.

    Args:
        names: of the classes.
        where: the data, at the beginning of the message.
    """
    known: dict[str, str] = {}
    for name in names:
        other = known.setdefault(unicodedata.normalize("NFC", name).strip().casefold(), name)
        if other != name:
            warnings.warn(
                f"{where} has the classes {other!r} and {name!r}, whose names are nearly equal; "
                "if they are one class, merge them",
                stacklevel=1,
            )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:_SHOWN])) + (f", … ({len(names)} names)" if len(names) > _SHOWN else "")
