"""timm models by name, with weights from the hub or from a file, and their preprocessing and class names."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any, Literal, Protocol, cast

import timm
from timm.models import _hub
from torch import nn

from visionattn.data import Preprocess, image_shape
from visionattn.errors import DataError, UsageError, first_line, nearest
from visionattn.files import printable
from visionattn.models.architectures import Architecture, known_architecture, remember_architecture
from visionattn.models.hub import only_cache_without_network
from visionattn.models.weights import (
    head_rows,
    mismatch_error,
    read_state,
    require_weights,
    weights_mismatch,
    without_wrappers,
)

PLACES = ("hf-hub:", "hf_hub:", "local-dir:")
"""Prefixes of names of timm models that are on the hub or in a folder."""

_FITS: dict[str, Literal["crop", "letterbox", "stretch"]] = {
    "center": "crop",
    "border": "letterbox",
    "squash": "stretch",
}
"""timm's crop mode → `fit` of `Preprocess`."""


def create_backbone(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    new_head: bool = False,
    **options: Any,
) -> nn.Module:
    """Create a timm model.

    Args:
        name: timm's name, e.g. `resnet50` or `vit_small_patch16_224.augreg_in1k`; `hf-hub:OWNER/NAME` for a model of
            timm on the hub, or `local-dir:FOLDER` for one in a folder.
        num_classes: number of outputs of the head (default: as many as in the weights). If the weights have another
            number of outputs, the model gets a new head.
        pretrained: load the model's default weights from the hub (default: False).
        weights: file of weights to load instead, see `read_state`; no code in it is executed.
        new_head: do not load the head from `weights` (default: False). Without num_classes, the model has no head.
        options: further arguments of the timm model, e.g. `img_size`, `drop_path_rate`.

    Raises:
        UsageError: timm has no such model, or the model has no such option.
        DataError: the weights cannot be loaded, or do not fit the model.
    """
    made_from = _check_name(name)
    if new_head:
        require_weights(weights)
    if made_from is not None:
        name, options = made_from["architecture"], {**made_from["options"], **options}
        own_classes = options.pop("num_classes", None)
        num_classes = own_classes if num_classes is None else num_classes
    if weights is None:
        if not pretrained and not name.startswith(PLACES):
            return _create(name, num_classes=num_classes, **options)
        with _reading(name):
            return _create(name, pretrained=pretrained, num_classes=num_classes, **options)

    if name.startswith(PLACES):
        raise UsageError(f"{name} has its own weights; give weights only with a name of timm, such as resnet50")
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    heads, firsts = (_names(getattr(config, key, None)) for key in ("classifier", "first_conv"))
    state = without_wrappers(read_state(weights), [f"{first}.weight" for first in (*firsts, *heads)])
    if new_head:
        state = {key: value for key, value in state.items() if not key.startswith(tuple(f"{head}." for head in heads))}
    rows = 0 if new_head else head_rows(state, heads[0] if heads else "")
    overlay = {"state_dict": state, **({} if rows is None else {"num_classes": rows})}
    try:
        model = _create(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=rows, **options)
    except (RuntimeError, KeyError) as error:
        plain = _create(name, num_classes=rows, **options)
        missing = plain.state_dict().keys() - state.keys()
        only_head = bool(heads) and all(key.startswith(tuple(f"{head}." for head in heads)) for key in missing)
        reason = weights_mismatch(plain, state) or first_line(error)
        raise mismatch_error(weights, name, reason, only_head=only_head and bool(missing)) from error
    if num_classes is not None and num_classes != rows:
        cast(_TimmModel, model).reset_classifier(num_classes)
    return model


@contextlib.contextmanager
def _reading(name: str) -> Iterator[None]:
    """Turn the errors of reading a model from the hub or from a folder into a DataError."""
    # offline, the hub's client warns at each of its eleven attempts; the error below reports the failure once
    client = logging.getLogger("huggingface_hub")
    level = client.level
    try:
        client.setLevel(logging.ERROR)
        with contextlib.nullcontext() if name.startswith("local-dir:") else only_cache_without_network():
            yield
    except UsageError:
        raise
    except Exception as error:  # each hub client raises errors of its own
        place = name.partition(":")[2]
        if name.startswith("local-dir:"):
            message = f"{name} cannot be read from the folder {printable(place)} ({first_line(error)})"
        elif name.startswith(PLACES):
            message = (
                f"{name} could not be loaded from the hub ({first_line(error)}); download its files on another machine "
                "and give their folder instead: local-dir:FOLDER"
            )
        else:
            message = (
                f"the weights of {name!r} could not be loaded from the hub ({first_line(error)}); "
                "give a local file instead: weights: FILE, a state dict as .safetensors or .pth"
            )
        raise DataError(message) from error
    finally:
        client.setLevel(level)


def _check_name(name: str) -> Architecture | None:
    """Return the `known_architecture` of a model on the hub or in a folder; None for other names.

    Raises:
        UsageError: timm has no such model.
    """
    if name.startswith(PLACES):
        return known_architecture(name)
    known = timm.list_models(exclude_filters="test_*") + timm.list_models("test_*")
    if name.split(".")[0] not in known:
        raise UsageError(f"timm has no model {name!r}.{nearest(name, known)}")
    return None


def _names(value: object) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, (tuple, list)) else ()


def preprocess_of(model: nn.Module) -> Preprocess:
    """Return a timm model's preprocessing from its own configuration; the inputs equal timm's within 1/255."""
    config = timm.data.resolve_model_data_config(model)
    return Preprocess(
        size=image_shape(model)[1:],  # a ViT may be built for another size than its weights
        fit=_FITS.get(config["crop_mode"], "crop"),
        crop_fraction=config["crop_pct"],
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
    )


def class_names_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of a timm model's outputs if timm knows them, else ().

    timm knows the names of ImageNet and its subsets, and models of the hub bring theirs. A model whose head was
    replaced by one with another number of outputs has no known names.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    own = tuple(config.get("label_names") or ())
    if not own:
        subset = timm.data.infer_imagenet_subset(model)
        if subset is None:
            return ()
        info = timm.data.ImageNetInfo(subset)
        own = tuple(info.index_to_description(index) for index in range(info.num_classes()))
    heads = cast(_TimmModel, model).get_classifier() if hasattr(model, "get_classifier") else ()
    for head in heads if isinstance(heads, (tuple, list)) else (heads,):
        outputs = getattr(head, "out_features", None) or getattr(head, "out_channels", None)
        if outputs is not None and outputs != len(own):
            return ()
    return own


class _TimmModel(Protocol):
    """The methods of every timm model that return and replace its head."""

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]: ...

    def reset_classifier(self, num_classes: int) -> None: ...


def _create(name: str, **options: Any) -> nn.Module:
    options = {key: value for key, value in options.items() if value is not None}
    try:
        model = timm.create_model(name, **options)
    except TypeError as error:
        raise UsageError(f"{name} does not accept these options: {first_line(error)}") from error
    if name.startswith(PLACES):
        remember_architecture(model, name, _architecture(name))
    return model


def _architecture(name: str) -> Architecture:
    """Return the timm name and the options of a model on the hub or in a folder."""
    place = name.partition(":")[2]
    read = _hub.load_model_config_from_path if name.startswith("local") else _hub.load_model_config_from_hf
    _, architecture, options = read(place)
    return {"architecture": architecture, "options": dict(options or {})}
