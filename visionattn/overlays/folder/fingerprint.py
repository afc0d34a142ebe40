"""The fingerprint of an export: a short hash of every choice that affects the outputs.

The same fingerprint and the same source give the same output, so a second run can skip it.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import torch
from torch import nn

from visionattn.overlays.explainer import Explainer

VERSION = 2
"""Number that must be raised when the drawing of outputs changes, so that earlier outputs are made again.

`tests/overlays/folder/test_fingerprint.py` compares the drawing with a golden image.
"""

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""Data that JSON can hold."""


def fingerprint_of(explainers: Sequence[Explainer], **choices: object) -> str:
    """Hash every choice that affects an output, except the image itself.

    Args:
        explainers: their models' structure and weights, preprocessing, methods, class names and names are hashed.
        choices: further choices, such as the target and the style; anything that `describe` takes.

    Returns:
        16 hexadecimal digits.
    """
    hashes: dict[int, str] = {}
    for explainer in explainers:  # several explainers may share a model
        hashes.setdefault(id(explainer.model), weights_hash(explainer.model))
    described = [
        [
            hashes[id(explainer.model)],
            *map(describe, (explainer.preprocess, explainer.method, explainer.class_names, explainer.name)),
        ]
        for explainer in explainers
    ]
    return hashlib.blake2b(json.dumps([VERSION, described, describe(choices)]).encode(), digest_size=8).hexdigest()


def weights_hash(model: nn.Module) -> str:
    """Hash a model's structure, weights and buffers; takes about a second per gigabyte."""
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


def describe(value: object) -> Plain:
    """Convert a choice to plain data that is the same in every process; different choices give different data."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): describe(item) for key, item in sorted(value.items(), key=lambda pair: str(pair[0]))}
    if isinstance(value, (list, tuple)):
        return [describe(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return [*sorted(json.dumps(describe(item)) for item in value)]
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
    # an object without a __dict__, such as a path, is described by its repr
    inside = describe(vars(value)) if hasattr(value, "__dict__") else repr(value)
    return [f"{type(value).__module__}.{type(value).__qualname__}", inside]
