"""An explainer: a model with its preprocessing, heatmap method and class names; and its fingerprint."""

import dataclasses
import functools
import hashlib
import json
import types
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from visionattn.capture import own_state, unwrap
from visionattn.data import Placement, Preprocess, class_index, image_shape
from visionattn.errors import DataError, MapWarning, UsageError, nearest
from visionattn.maps import (
    BOX_METHODS,
    METHODS,
    Heatmaps,
    MaxOverBoxes,
    Method,
    at_layer,
    default_box_method,
    label_threshold,
    make_method,
    probabilities_of,
    scores_of,
)
from visionattn.models import Detector
from visionattn.overlays.outputs import VERSION, ExplainedImage, GlimpseTrace
from visionattn.overlays.per_box import DetectedBoxes, detected_boxes

Explain = Callable[..., Heatmaps]
"""A method of `visionattn.maps`, or any function called the same way: (model, images_BCHW, target=…) → Heatmaps."""

Plain: TypeAlias = "bool | int | float | str | list[Plain] | dict[str, Plain] | None"
"""Data that JSON can hold."""

_REMEDY = 'for the number, write it without quotes in Python or in a .jsonl list, e.g. {"path": "a.jpg", "target": 1}'


@dataclass(frozen=True)
class Explainer:
    """A model with its preprocessing, heatmap method and class names.

    Attributes:
        model: any vision model, on any device; images are moved to that device.
        preprocess: prepares a picture for the model.
        method: the heatmap method, a `MaxOverBoxes` for the boxes of a detector. None means the model's default.
        class_names: names of the model's outputs; empty if unknown.
        model_name: the model's name in the manifest; "" means the name of its class.
        name: the explainer's name in sheets and arrays; "" means the method's name.
    """

    model: nn.Module
    preprocess: Preprocess
    method: Explain | None = None
    class_names: tuple[str, ...] = ()
    model_name: str = ""
    name: str = ""

    def chosen(self) -> "Explainer":
        """Return this explainer; without a method, a copy with the model's default method."""
        if self.method is not None:
            return self
        return replace(self, method=find_method(None, None, self.model, grey_image(self.model, self.preprocess)))

    @functools.cached_property
    def convolves(self) -> bool:
        """Whether the model is a convolutional network: it has more than four Conv2d layers (a ViT has one)."""
        return sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > 4

    def batch(self, images_BCHW: Tensor) -> Tensor:
        """Move images to the model's device, dtype and fastest memory format."""
        like = next(self.model.parameters(), images_BCHW)
        images_BCHW = images_BCHW.to(like.device, like.dtype)
        if self.convolves:  # channels last is faster: by a fifth, *measured* with ResNet-50 on a CPU
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return images_BCHW

    def target(self, target: int | str | None) -> int | None:
        """Return the index of an output.

        Args:
            target: the index, the class name, or None. Text of digits is an index too, see `class_index`.

        Raises:
            DataError: there is no such class, or the text is the name of one class and the index of another.
        """
        if target is None or isinstance(target, int):
            return target
        return class_index(target, self.class_names, remedy=_REMEDY)


def targets_of(explainers: Sequence[Explainer], target: int | str | None) -> list[int | None]:
    """Return the index of a target for each explainer.

    Raises:
        DataError: a model has no such class, or the target is a number that means different classes in two models.
    """
    indices = [explainer.target(target) for explainer in explainers]
    names = [
        explainer.class_names[index]
        for explainer, index in zip(explainers, indices, strict=True)
        if index is not None and index < len(explainer.class_names)
    ]
    if len(set(names)) > 1:
        other = next(name for name in names if name != names[0])
        raise DataError(
            f"the target {target} is {names[0]!r} in one model and {other!r} in another; give the name of the class"
        )
    return indices


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one image; every field is None if the model is no classifier.

    Attributes:
        index: index of the class.
        class_name: name of the class; None if unknown.
        probability: softmax probability, or sigmoid if the model's outputs are independent labels; rounded to six
            digits, and None if it is not finite.
        labels: if the outputs are independent labels: (name, probability) of each label above the model's
            `label_threshold`, the most probable first; otherwise None.
    """

    index: int | None = None
    class_name: str | None = None
    probability: float | None = None
    labels: tuple[tuple[str, float], ...] | None = None

    @property
    def caption(self) -> str:
        """The prediction as text: `daisy 0.93`, `class 3 0.93` without class names, or "" if there is none.

        For independent labels, it names all labels above the threshold, `dog 0.93, cat 0.71`, or is `no label`.
        """
        if self.index is None:
            return ""
        if self.labels is not None:
            return ", ".join(f"{name} {probability:.2f}" for name, probability in self.labels) or "no label"
        name = self.class_name or f"class {self.index}"
        return name if self.probability is None else f"{name} {self.probability:.2f}"


def grey_image(model: nn.Module, preprocess: Preprocess) -> Tensor:
    """Return a grey image (1, C, H, W) of the preprocessing's size, as an example of the model's input."""
    image = torch.zeros(1, preprocess.channels, *preprocess.input_size)
    like = next(model.parameters(), image)
    return image.to(like.device, like.dtype)


def is_detector(model: nn.Module) -> bool:
    """Return whether a model is a detector of visionattn or torchvision."""
    return isinstance(model, Detector) or type(model).__module__.startswith("torchvision.models.detection")


def find_method(
    name: str | None, layer: int | str | None, model: nn.Module, images_BCHW: Tensor | None = None
) -> Method | MaxOverBoxes:
    """Create a heatmap method from its name and layer. A method for boxes is wrapped: `MaxOverBoxes` makes one map per
    image.

    Args:
        name: a name in `maps.METHODS` or `maps.BOX_METHODS`; None means the model's default method.
        layer: name of a module, or its index among the modules that the method uses; None means the method's default.
        model: any vision model.
        images_BCHW: an example of the model's input. Default: a grey image of the size the model was configured for.

    Raises:
        UsageError: there is no such method, or the method cannot use the layer.
    """
    known = (*METHODS, *BOX_METHODS)
    if name is not None and name not in known:
        raise UsageError(f"there is no method {name!r}.{nearest(name, known)} All: {', '.join(known)}.")
    if name is None and is_detector(model):
        return MaxOverBoxes(at_layer(type(default_box_method(model)), layer))
    if name is None:
        return make_method(None, layer, model, images_BCHW)
    if name in BOX_METHODS:
        return MaxOverBoxes(at_layer(BOX_METHODS[name], layer))
    method: Method = at_layer(METHODS[name], layer)
    return method


class _DescribedTask(Protocol):
    """The part of a task that describes its network."""

    preprocess: Preprocess | None
    class_names: Sequence[str]


def describe_model(model: nn.Module) -> tuple[nn.Module, Preprocess | None, tuple[str, ...]]:
    """Return a model's network, preprocessing and class names, as far as they are known.

    A loaded task has all three. The preprocessing is also known for timm models, for a `Classifier` with a timm
    backbone, and for torchvision's models other than detectors. Class names are also known for timm's ImageNet models.

    Args:
        model: any vision model or task.

    Returns:
        The network of a task, or the model itself; its preprocessing or None; the class names, empty if unknown.
    """
    from visionattn.models import class_names_of, preprocess_of

    model = unwrap(model)
    network = getattr(model, "network", None)
    if isinstance(network, nn.Module) and _describes(model):
        return network, model.preprocess or describe_model(network)[1], tuple(model.class_names)
    if isinstance(getattr(model, "pretrained_cfg", None), dict):
        return model, preprocess_of(model), class_names_of(model)
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module) and hasattr(backbone, "pretrained_cfg"):
        return model, preprocess_of(backbone), ()
    home = type(model).__module__
    if home.startswith("torchvision.models.") and ".detection" not in home:
        # most of torchvision's weights expect a centre crop of 224 of 256 pixels, and ImageNet's mean and std; unlike
        # `load_model("torchvision:…")`, the model does not say which weights it has
        preprocess = Preprocess(image_shape(model)[1:], crop_fraction=224 / 256, interpolation="bilinear")
        return model, preprocess, ()
    return model, None, ()


_warned: "weakref.WeakSet[nn.Module]" = weakref.WeakSet()


def assumed_preprocess(model: nn.Module, *, stacklevel: int) -> Preprocess:
    """Return the default preprocessing for a model whose own is unknown, and warn once for each model.

    Args:
        model: the model.
        stacklevel: which caller the warning names, as for `warnings.warn`.

    Returns:
        The size is the model's own if it has an `image_size` or the like, else 224 × 224; mean and standard deviation
        are ImageNet's.
    """
    preprocess = Preprocess(image_shape(model)[1:])
    if model not in _warned:
        _warned.add(model)
        height, width = preprocess.input_size
        size = height if height == width else (height, width)
        warnings.warn(
            f"this {type(model).__name__} does not say how its images are prepared, so they are cropped to {height} × "
            f"{width} pixels and normalised with mean {preprocess.mean} and std {preprocess.std}; if it was trained "
            f"otherwise, pass preprocess=visionattn.data.Preprocess({size}, mean=…, std=…)",
            MapWarning,
            stacklevel=stacklevel,
        )
    return preprocess


def _describes(model: object) -> TypeGuard[_DescribedTask]:
    return hasattr(model, "preprocess") and hasattr(model, "class_names")


def predictions_of(explainer: Explainer, output: object, count: int) -> list[Prediction]:
    """Return the most probable class of each image.

    Args:
        explainer: the model and its class names.
        output: the model's output for the batch.
        count: number of images in the batch.

    Returns:
        One prediction for each image; an empty `Prediction` if the output has no scores of at least two classes.

    Raises:
        UsageError: the number of class names differs from the number of outputs.
    """
    empty = [Prediction()] * count
    if getattr(explainer.model, "num_classes", None) == 0:  # a timm model without its head returns features
        return empty
    try:
        scores_BK: Tensor = scores_of(output)
    except UsageError:
        return empty
    names = explainer.class_names
    if names and len(names) != scores_BK.shape[1]:
        raise UsageError(f"there are {len(names)} class names, and the model has {scores_BK.shape[1]} outputs")
    threshold = label_threshold(explainer.model)
    if scores_BK.shape[1] < 2 and threshold is None:
        return empty
    probabilities_BK = probabilities_of(explainer.model, scores_BK.float()).cpu()
    probability_B, index_B = probabilities_BK.max(1)
    return [
        Prediction(
            index,
            names[index] if names else None,
            round(probability, 6) if np.isfinite(probability) else None,
            None if threshold is None else labels_above(threshold, probability_K, names),
        )
        for index, probability, probability_K in zip(
            index_B.tolist(), probability_B.tolist(), probabilities_BK, strict=True
        )
    ]


def labels_above(threshold: float, probability_K: Tensor, names: Sequence[str]) -> tuple[tuple[str, float], ...]:
    """Return (name, probability) of each label above a threshold, the most probable first.

    Args:
        threshold: a probability.
        probability_K: (K,).
        names: of the labels; empty if unknown.
    """
    order = probability_K.argsort(descending=True, stable=True).tolist()
    return tuple(
        (names[index] if names else f"class {index}", round(probability, 6))
        for index in order
        if (probability := float(probability_K[index])) > threshold
    )


def explained_images(
    explainer: Explainer,
    maps: Heatmaps,
    placements: Sequence[Placement],
    predictions: Sequence[Prediction],
    glimpse_traces: Sequence[GlimpseTrace | None],
) -> list[ExplainedImage]:
    """Split the heatmaps of a batch into one explanation for each image.

    Args:
        explainer: the explainer that made the heatmaps.
        maps: heatmaps of the batch.
        placements: for each image, the placement of the source in the model's input.
        predictions: the prediction of each image, by `predictions_of`.
        glimpse_traces: the glimpse trace of each image, see `ExplainedImage`.
    """
    heatmaps_Bhw, raw_Bhw = (x.detach().float().cpu().numpy() for x in (maps.heatmaps, maps.raw))
    glimpses = [None] * len(placements) if maps.boxes is None else maps.boxes.cpu().numpy()
    explanations = []
    for index, placement in enumerate(placements):
        found = DetectedBoxes([], [], None)
        if isinstance(maps.output, (list, tuple)):  # the output of a detector
            found = detected_boxes(explainer.class_names, maps.output, index, placement)
        explained = ExplainedImage(
            explainer.name or maps.method,
            predictions[index].caption,
            heatmaps_Bhw[index],
            raw_Bhw[index],
            placement,
            found.boxes,
            found.labels,
            glimpses[index],
            glimpse_traces[index],
            explainer.class_names,
            found.maps,
        )
        explanations.append(explained)
    return explanations


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
    """Hash a model's structure, attributes, hooks, weights and buffers; takes about a second per gigabyte."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        own, hooks = own_state(module)
        state = [_describe_part(own), _describe_part(list(hooks.values()))]
        digest.update(f"{name}:{type(module).__qualname__}:{module.extra_repr()}:{json.dumps(state)}\n".encode())
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, torch.Tensor):
            digest.update(f"{name}:{tensor!r}\n".encode())
            continue
        digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _describe_part(value: object, depth: int = 0) -> Plain:
    """Convert an attribute of a module to plain data. A module becomes its class name, since it is hashed apart."""
    if isinstance(value, nn.Module) or depth == 8:
        return type(value).__qualname__
    if isinstance(value, Mapping):
        parts = {str(key): _describe_part(item, depth + 1) for key, item in value.items()}
        return dict(sorted(parts.items()))
    if isinstance(value, (list, tuple)):
        return [_describe_part(item, depth + 1) for item in value]
    if isinstance(value, types.MethodType):
        return [_describe_part(value.__func__, depth + 1), _describe_part(value.__self__, depth + 1)]
    if isinstance(value, types.FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return [
            value.__qualname__,
            value.__code__.co_code.hex(),
            _describe_part([value.__defaults__, cells], depth + 1),
        ]
    if isinstance(value, functools.partial):
        return [_describe_part(part, depth + 1) for part in (value.func, value.args, value.keywords)]
    if hasattr(value, "__dict__") and not hasattr(value, "__qualname__") and not isinstance(value, torch.Tensor):
        return [type(value).__qualname__, _describe_part(vars(value), depth + 1)]
    return describe(value)


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
