"""torchvision's classifiers by name, with the preprocessing and the class names of their weights."""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torchvision
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder, get_model_weights, list_models

from visionattn.data import Preprocess, crop_fraction_of
from visionattn.errors import DataError, UsageError, first_line, nearest
from visionattn.models.weights import head_of, load_classifier, read_state, replace_heads, require_weights

PREFIX = "torchvision:"

_AUXILIARY = {"googlenet": ("aux1", "aux2"), "inception_v3": ("AuxLogits",)}
"""Model → its auxiliary heads, which are only for training."""


def create_torchvision_classifier(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    new_head: bool = False,
    **options: Any,
) -> nn.Module:
    """Create a classifier of torchvision.

    Args:
        name: `torchvision:NAME`, e.g. `torchvision:resnet50`, or `torchvision:NAME/WEIGHTS` with the name of a member
            of the model's weights enum, e.g. `torchvision:resnet50/IMAGENET1K_V1` (default: its `DEFAULT`).
        num_classes, pretrained, weights, new_head: as for `create_backbone`.
        options: further arguments of torchvision's function, e.g. `dropout`.

    Raises:
        UsageError: torchvision has no such classifier, weights or option.
        DataError: the weights cannot be loaded, or do not fit the model.
    """
    known = _weights_of(name)
    function = name.removeprefix(PREFIX).partition("/")[0]
    if new_head:
        require_weights(weights)
    state = None if weights is None else read_state(weights)
    load_pretrained = pretrained and state is None
    builder = get_model_builder(function)
    auxiliary = _AUXILIARY.get(function, ())
    if auxiliary and not load_pretrained:  # torchvision sets these options itself for pretrained weights
        options = {"init_weights": False, "aux_logits": False, "transform_input": True} | options
    try:
        with _weights_only():
            model: nn.Module = builder(weights=known if load_pretrained else None, progress=False, **options)
    except TypeError as error:
        raise UsageError(f"{name} does not accept these options: {first_line(error)}") from error
    except Exception as error:  # the download raises many types of errors
        if not load_pretrained:
            raise
        raise DataError(
            f"the weights {known} of {name} could not be loaded ({first_line(error)}); give a local file instead: "
            "--weights FILE (weights: FILE in YAML)"
        ) from error
    if auxiliary:  # these heads return further outputs in training
        vars(model)["aux_logits"] = False
        for head in auxiliary:
            setattr(model, head, None)
    heads = (head_of(model),)
    if state is None:
        replace_heads(model, heads, num_classes)
    else:
        assert weights is not None
        state = {key: value for key, value in state.items() if not set(auxiliary) & set(key.split("."))}
        load_classifier(model, state, weights, heads=heads, num_classes=num_classes, new_head=new_head, name=name)
    return model


def torchvision_preprocess(name: str) -> Preprocess:
    """Return the preprocessing of named weights. Its images equal those of the weights' `transforms()` within 1/255.

    Args:
        name: see `create_torchvision_classifier`.
    """
    transforms = _weights_of(name).transforms()
    (size,), (frame,) = transforms.crop_size, transforms.resize_size
    return Preprocess(
        size=size,
        crop_fraction=crop_fraction_of(size, frame),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def torchvision_class_names(name: str) -> tuple[str, ...]:
    """Return the class names of named weights; () if torchvision does not know them."""
    return tuple(_weights_of(name).meta.get("categories") or ())


def _weights_of(name: str) -> WeightsEnum:
    """Return the member of the weights enum that a name means.

    Raises:
        UsageError: torchvision has no such classifier or weights.
    """
    function, _, member = name.removeprefix(PREFIX).partition("/")
    classifiers = list_models(module=torchvision.models)
    if function not in classifiers:
        if function in list_models():
            raise UsageError(f"torchvision's {function} is no classifier; {PREFIX}NAME takes the names of classifiers")
        raise UsageError(f"torchvision has no classifier {function!r}.{nearest(function, classifiers)}")
    enum = get_model_weights(function)
    if member and member not in (*enum.__members__, "DEFAULT"):
        raise UsageError(f"torchvision's {function} has no weights {member!r}. All: {', '.join(enum.__members__)}.")
    weights: WeightsEnum = getattr(enum, member or "DEFAULT")
    return weights


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Make torch read no pickled code from a download: torchvision's functions have no argument for this."""
    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
