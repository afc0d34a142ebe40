"""timm models by name, with weights from the hub or from a file, and their preprocessing and class names."""

import logging
import os
from collections.abc import Mapping
from typing import Any, Literal, Protocol, cast

import timm
import timm.models
from torch import Tensor, nn

from visionattn.data import Preprocess, image_shape
from visionattn.errors import DataError, UsageError, nearest
from visionattn.files import local_path

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
    **options: Any,
) -> nn.Module:
    """Create a timm model.

    Args:
        name: timm's name, e.g. `resnet50` or `vit_small_patch16_224.augreg_in1k`.
        num_classes: number of outputs of the head (default: as many as in the weights). If the weights have another
            number of outputs, the model gets a new head.
        pretrained: load the model's default weights from the hub (default: False).
        weights: file of weights to load instead, a state dict as .safetensors or .pth; no code in it is executed.
        options: further arguments of the timm model, e.g. `img_size`, `drop_path_rate`.

    Raises:
        UsageError: timm has no such model, or the model has no such option.
        DataError: the weights cannot be loaded, or do not fit the model.
    """
    known = timm.list_models(exclude_filters="test_*") + timm.list_models("test_*")
    if name.split(".")[0] not in known:
        raise UsageError(f"timm has no model {name!r}.{nearest(name, known)}")
    if weights is None and not pretrained:
        return _create(name, num_classes=num_classes, **options)
    if weights is None:
        # offline, the hub's client warns at each of its eleven attempts; the error below reports the failure once
        client = logging.getLogger("huggingface_hub")
        level = client.level
        try:
            client.setLevel(logging.ERROR)
            return _create(name, pretrained=True, num_classes=num_classes, **options)
        except UsageError:
            raise
        except Exception as error:  # each hub client raises errors of its own
            raise DataError(
                f"the weights of {name!r} could not be loaded from the hub ({_first_line(error)}); "
                "give a local file instead: weights: FILE, a state dict as .safetensors or .pth"
            ) from error
        finally:
            client.setLevel(level)

    state = read_state(weights)
    rows = _head_rows(name, state)
    overlay = {"state_dict": state, **({"num_classes": rows} if rows else {})}
    try:
        model = _create(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=rows, **options)
    except (RuntimeError, KeyError) as error:
        reason = weights_mismatch(_create(name, num_classes=rows, **options), state) or _first_line(error)
        raise DataError(f"the weights in {os.fspath(weights)} are not those of a {name}: {reason}") from error
    if num_classes is not None and num_classes != rows:
        cast(_TimmModel, model).reset_classifier(num_classes)
    return model


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
    """Return the names of a timm model's outputs if timm knows them (ImageNet and its subsets), else ().

    A model whose head was replaced by one with another number of outputs has no known names.
    """
    subset = timm.data.infer_imagenet_subset(model)
    if subset is None:
        return ()
    info = timm.data.ImageNetInfo(subset)
    heads = cast(_TimmModel, model).get_classifier() if hasattr(model, "get_classifier") else ()
    for head in heads if isinstance(heads, (tuple, list)) else (heads,):
        outputs = getattr(head, "out_features", None) or getattr(head, "out_channels", None)
        if outputs is not None and outputs != info.num_classes():
            return ()
    return tuple(info.index_to_description(index) for index in range(info.num_classes()))


def weights_mismatch(model: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Return how a state dict differs from a model's: three names and a count of each kind of difference, or ""."""
    own = model.state_dict()
    shapes = [
        f"{name} {tuple(state[name].shape)} and not {tuple(tensor.shape)}"
        for name, tensor in own.items()
        if name in state and state[name].shape != tensor.shape
    ]
    kinds = {
        "missing": [name for name in own if name not in state],
        "unknown": [name for name in state if name not in own],
        "of another shape": shapes,
    }
    return "; ".join(
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in kinds.items()
        if names
    )


class _TimmModel(Protocol):
    """The methods of every timm model that return and replace its head."""

    def get_classifier(self) -> nn.Module | tuple[nn.Module, ...]: ...

    def reset_classifier(self, num_classes: int) -> None: ...


def _create(name: str, **options: Any) -> nn.Module:
    try:
        return timm.create_model(name, **{key: value for key, value in options.items() if value is not None})
    except TypeError as error:
        raise UsageError(f"{name} does not accept these options: {_first_line(error)}") from error


def read_state(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Read a state dict from a .safetensors file or a file of torch; no code in it is executed.

    Raises:
        DataError: there is no such file, or it holds no weights that can be read safely.
    """
    local_path(path)
    if not os.path.isfile(path):
        raise DataError(f"there is no weights file {os.fspath(path)}")
    try:
        return timm.models.load_state_dict(os.fspath(path), use_ema=False, weights_only=True)
    except Exception as error:  # a truncated file, not a checkpoint, or a pickle that would run code
        raise DataError(f"{os.fspath(path)} holds no weights that can be read safely: {_first_line(error)}") from error


def _head_rows(name: str, state: dict[str, Tensor]) -> int | None:
    config = timm.models.get_pretrained_cfg(name, allow_unregistered=True)
    classifier = getattr(config, "classifier", None)
    classifier = classifier[0] if isinstance(classifier, (tuple, list)) else classifier
    weight = state.get(f"{classifier}.weight")
    return None if weight is None else weight.shape[0]


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
