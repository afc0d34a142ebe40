"""What decides how an output looks, as a short hash: the same recipe and the same source give the same output."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

VERSION = 2
"""Raised when the drawing changes, so that earlier overlays are made again."""


def recipe_of(views: Sequence[Any], **choices: Any) -> str:
    """Hash all that decides an output but the image itself: the views' models, methods and preparation, and choices."""
    hashes: dict[int, str] = {}
    for view in views:  # one model may have several methods
        hashes.setdefault(id(view.model), weights_hash(view.model))
    looks = [
        [hashes[id(view.model)], *map(describe, (view.preprocess, view.method, view.class_names, view.name))]
        for view in views
    ]
    return hashlib.blake2b(json.dumps([VERSION, looks, describe(choices)]).encode(), digest_size=8).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Hash a model's structure, weights and buffers; about a second a gigabyte."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        digest.update(f"{name}:{type(module).__qualname__}:{module.extra_repr()}\n".encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            digest.update(f"{name}:{tensor!r}\n".encode())
            continue
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def describe(value: Any) -> Any:
    """Plain data that tells two choices apart, and does not change from one process to the next."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(json.dumps(describe(item)) for item in value)
    if isinstance(value, (torch.Tensor, np.ndarray, np.generic)):
        return [str(value.dtype), value.tolist()]
    if isinstance(value, functools.partial):
        return ["partial", *map(describe, (value.func, value.args, value.keywords))]
    if isinstance(value, nn.Module):
        return [type(value).__qualname__, weights_hash(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: describe(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return [type(value).__qualname__, fields]
    if hasattr(value, "__qualname__"):  # a class or a function
        return f"{value.__module__}.{value.__qualname__}"
    # what keeps nothing in a __dict__, as a path, must say itself what it is
    inside = describe(value.__dict__) if hasattr(value, "__dict__") else repr(value)
    return [f"{type(value).__module__}.{type(value).__qualname__}", inside]
