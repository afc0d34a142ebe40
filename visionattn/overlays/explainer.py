"""An explainer: a model with its preprocessing, heatmap method and class names."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from visionattn.capture import unwrap
from visionattn.data import Placement, Preprocess, image_shape
from visionattn.errors import DataError, UsageError, nearest
from visionattn.maps import (
    BOX_METHODS,
    METHODS,
    Heatmaps,
    MaxOverBoxes,
    Method,
    at_layer,
    default_box_method,
    make_method,
    scores_of,
)
from visionattn.models import Detector
from visionattn.overlays.outputs import ExplainedImage, GlimpseTrace
from visionattn.overlays.per_box import DetectedBoxes, detected_boxes

Explain = Callable[..., Heatmaps]
"""A method of `visionattn.maps`, or any function called the same way: (model, images_BCHW, target=…) → Heatmaps."""


@dataclass(frozen=True)
class Explainer:
    """A model with its preprocessing, heatmap method and class names.

    Attributes:
        model: any vision model, on any device; images are moved to that device.
        preprocess: prepares a picture for the model.
        method: the heatmap method; for the boxes of a detector a `MaxOverBoxes`. None for the default of the model.
        class_names: of the model's outputs; empty if unknown.
        model_name: for the manifest; "" for the name of the model's class.
        name: distinguishes this explainer in sheets and arrays; "" for the name of the method.
    """

    model: nn.Module
    preprocess: Preprocess
    method: Explain | None = None
    class_names: tuple[str, ...] = ()
    model_name: str = ""
    name: str = ""

    def chosen(self) -> "Explainer":
        """Return the explainer with its method set: the default of the model if there was none."""
        return self if self.method is not None else replace(self, method=find_method(None, None, self.model))

    @functools.cached_property
    def convolves(self) -> bool:
        """Whether the model is a convolutional network; the patch embedding of a ViT does not count."""
        return sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > 4

    def batch(self, images_BCHW: Tensor) -> Tensor:
        """Return images on the model's device, in its dtype and its fastest memory format."""
        like = next(self.model.parameters(), images_BCHW)
        images_BCHW = images_BCHW.to(like.device, like.dtype)
        if self.convolves:  # fastest with channels last: *measured* on a CPU, a fifth faster for ResNet-50
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return images_BCHW

    def target(self, target: int | str | None) -> int | None:
        """Return the index of an output.

        Args:
            target: the index, the class name, or None.

        Raises:
            DataError: there is no such class.
        """
        if target is None or isinstance(target, int):
            return target
        if target not in self.class_names:
            raise DataError(f"the model has no class {target!r}.{nearest(target, self.class_names)}")
        return self.class_names.index(target)


@dataclass(frozen=True)
class Prediction:
    """The most probable class of one image; every field is None if the model is no classifier.

    Attributes:
        index: of the output.
        class_name: None if the names are unknown.
        probability: by softmax, rounded to six digits; None if it is not finite.
    """

    index: int | None = None
    class_name: str | None = None
    probability: float | None = None

    @property
    def caption(self) -> str:
        """The prediction as text: `daisy 0.93`, `class 3 0.93` without class names, or "" if there is none."""
        if self.index is None:
            return ""
        name = self.class_name or f"class {self.index}"
        return name if self.probability is None else f"{name} {self.probability:.2f}"


def is_detector(model: nn.Module) -> bool:
    """Return whether a model is a detector of visionattn or torchvision."""
    return isinstance(model, Detector) or type(model).__module__.startswith("torchvision.models.detection")


def find_method(
    name: str | None, layer: int | str | None, model: nn.Module, images_BCHW: Tensor | None = None
) -> Method | MaxOverBoxes:
    """Create a heatmap method from its name, for one layer, for whole images or for the boxes of a detector.

    Args:
        name: in `maps.METHODS` or `maps.BOX_METHODS`; None for the default of the model.
        layer: name of a module, or its index among the modules that the method uses; None for the method's default.
        model: any vision model.
        images_BCHW: an example of its input. Default: a grey image of the size the model was configured for.

    Raises:
        UsageError: there is no such method, or the method takes no such layer.
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
    """Return a model's network, preprocessing and class names, as far as the model states them.

    Loaded tasks state all of them. Models of timm and torchvision state their preprocessing, alone or inside a
    `Classifier`.

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
    if hasattr(model, "pretrained_cfg"):
        return model, preprocess_of(model), class_names_of(model)
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module) and hasattr(backbone, "pretrained_cfg"):
        return model, preprocess_of(backbone), ()
    home = type(model).__module__
    if home.startswith("torchvision.models.") and ".detection" not in home:
        # torchvision's weights expect a centre crop of 224 of 256 pixels, and ImageNet's mean and standard deviation
        return model, Preprocess(image_shape(model)[1:], crop_fraction=224 / 256), ()
    return model, None, ()


def _describes(model: object) -> TypeGuard[_DescribedTask]:
    return hasattr(model, "preprocess") and hasattr(model, "class_names")


def predictions_of(explainer: Explainer, output: object, count: int) -> list[Prediction]:
    """Return the most probable class of each image.

    Args:
        explainer: with the model and its class names.
        output: of the model for the batch.
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
    if scores_BK.shape[1] < 2:
        return empty
    probability_B, index_B = scores_BK.float().softmax(1).max(1)
    return [
        Prediction(index, names[index] if names else None, round(probability, 6) if np.isfinite(probability) else None)
        for index, probability in zip(index_B.tolist(), probability_B.tolist(), strict=True)
    ]


def explained_images(
    explainer: Explainer,
    maps: Heatmaps,
    placements: Sequence[Placement],
    predictions: Sequence[Prediction],
    glimpse_traces: Sequence[GlimpseTrace | None],
) -> list[ExplainedImage]:
    """Split the heatmaps of a batch into one explanation for each image.

    Args:
        explainer: that made the heatmaps.
        maps: of the batch.
        placements: of each source in its image.
        predictions: of each image, by `predictions_of`.
        glimpse_traces: of each image, see `ExplainedImage`.
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
