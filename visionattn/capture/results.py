"""Pickling of results and their conversion to plain data."""

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


def compact_state(result: object) -> dict[str, object]:
    """Return the attributes of a result for pickling. Each tensor's storage holds only its own elements.

    Without this, torch pickles a slice of a tensor with the whole storage that the slice shares: one of a hundred boxes
    would take the space of all hundred. Attributes with a leading underscore, such as cached properties, are left out.
    """
    return {name: _compact(value) for name, value in vars(result).items() if not name.startswith("_")}


def _compact(value: object) -> object:
    if isinstance(value, Tensor):
        shares = value.layout == torch.strided and value.untyped_storage().nbytes() > value.nbytes
        return value.clone() if shares else value
    if type(value) is dict:
        return {key: _compact(item) for key, item in value.items()}
    if type(value) is list:
        return [_compact(item) for item in value]
    if type(value) is tuple:
        return tuple(_compact(item) for item in value)
    return value


def to_plain(value: object) -> object:
    """Convert a value to numbers, strings, lists and dicts for `json.dumps`.

    Tensors and arrays become nested lists. NaN stays NaN, which `json.dumps` writes as `NaN`.

    Raises:
        TypeError: the value holds an object of another type.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [to_plain(item) for item in value]
    raise TypeError(
        f"cannot convert a {type(value).__name__} to plain data; use numbers, strings, tensors, arrays, lists or dicts"
    )
