"""One way to look at images: a model, its method, and what the model's answers are called."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.capture.running import unwrap
from visionattn.data.placement import Placement, Preprocess, image_shape
from visionattn.errors import DataError, UsageError, nearest
from visionattn.maps.boxes import BOX_METHODS, AllBoxes, default_box_method
from visionattn.maps.method import Maps, at_layer, scores_of
from visionattn.maps.selection import METHODS, method_of
from visionattn.models.detectors.detector import Detector
from visionattn.overlays.outputs import Look
from visionattn.overlays.per_box import Found, found_of

Explain = Callable[..., Maps]
"""A method of `visionattn.maps`, or anything that is called like one: (model, images_BCHW, target=…) → Maps."""


@dataclass(frozen=True)
class View:
    """One way to look at images.

    Attributes:
        model: any vision model, on any device; images follow it there.
        preprocess: brings a picture to the model's input.
        method: how attention becomes a heatmap, for a detector's boxes as `AllBoxes`; what fits the model by default.
        class_names: of the model's outputs.
        model_name: for the manifest; the class of the model by default.
        name: sets it apart from other views in sheets and arrays; the method's by default.
    """

    model: nn.Module
    preprocess: Preprocess
    method: Explain | None = None
    class_names: tuple[str, ...] = ()
    model_name: str = ""
    name: str = ""

    def chosen(self) -> "View":
        """The same, with its method."""
        return self if self.method is not None else replace(self, method=method_for(None, None, self.model))

    @functools.cached_property
    def convolves(self) -> bool:
        """Whether the model is made of convolutions, not one that only cuts patches by them."""
        return sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > 4

    def batch(self, images_BCHW: Tensor) -> Tensor:
        """Put images where the model is, in its type."""
        like = next(self.model.parameters(), images_BCHW)
        images_BCHW = images_BCHW.to(like.device, like.dtype)
        if self.convolves:  # which is quickest with channels last: *measured* on a CPU, ResNet-50 by a fifth
            images_BCHW = images_BCHW.contiguous(memory_format=torch.channels_last)
        return images_BCHW

    def target(self, wanted: int | str | None) -> int | None:
        """The number of an output, which may be given by its class name.

        Raises:
            DataError: there is no such class.
        """
        if wanted is None or isinstance(wanted, int):
            return wanted
        if wanted not in self.class_names:
            raise DataError(f"the model has no class {wanted!r}.{nearest(wanted, self.class_names)}")
        return self.class_names.index(wanted)


def detects(model: nn.Module) -> bool:
    """Whether a model is a detector, of ours or of torchvision."""
    return isinstance(model, Detector) or type(model).__module__.startswith("torchvision.models.detection")


def method_for(
    name: str | None, layer: int | str | None, model: nn.Module, images_BCHW: Tensor | None = None
) -> Explain:
    """The method of a name at a layer, as `method_of`, or one for the boxes of a detector, which is its default."""
    known: dict[str, Any] = {**METHODS, **BOX_METHODS}
    if name is not None and name not in known:
        raise UsageError(f"there is no method {name!r}.{nearest(name, known)} All: {', '.join(known)}.")
    if name is None and detects(model):
        return AllBoxes(at_layer(type(default_box_method(model)), layer))
    if name is None:
        return method_of(None, layer, model, images_BCHW)
    method = at_layer(known[name], layer)
    return AllBoxes(method) if name in BOX_METHODS else method


def known_of(model: nn.Module) -> tuple[nn.Module, Preprocess | None, tuple[str, ...]]:
    """The network of a task, or the model itself; how its pictures are prepared and what its outputs are called, as far
    as it says: tasks that were loaded, and models of timm and torchvision, alone or inside a `Classifier`, do."""
    from visionattn.models.backbone import class_names_of, preprocess_of

    model = unwrap(model)
    network = getattr(model, "network", None)
    task: Any = model
    if isinstance(network, nn.Module) and hasattr(task, "preprocess") and hasattr(task, "class_names"):
        return network, task.preprocess or known_of(network)[1], tuple(task.class_names)
    if hasattr(model, "pretrained_cfg"):
        return model, preprocess_of(model), class_names_of(model)
    backbone = getattr(model, "backbone", None)
    if isinstance(backbone, nn.Module) and hasattr(backbone, "pretrained_cfg"):
        return model, preprocess_of(backbone), ()
    home = type(model).__module__
    if home.startswith("torchvision.models.") and ".detection" not in home:
        # of torchvision's weights: the middle 224 of 256 pixels, by the mean and deviation of ImageNet
        return model, Preprocess(image_shape(model)[1:], crop_fraction=224 / 256), ()
    return model, None, ()


def predictions_of(view: View, output: Any, count: int) -> list[dict[str, Any]]:
    nothing = {"prediction": None, "class": None, "probability": None}
    if getattr(view.model, "num_classes", None) == 0:  # what a timm model without its head returns are features
        return [nothing] * count
    try:
        scores_BK: Tensor = scores_of(output)
    except UsageError:
        return [nothing] * count
    names = view.class_names
    if names and len(names) != scores_BK.shape[1]:
        raise UsageError(f"there are {len(names)} class names, and the model has {scores_BK.shape[1]} outputs")
    if scores_BK.shape[1] < 2:
        return [nothing] * count
    probability_B, index_B = scores_BK.float().softmax(1).max(1)
    return [
        {
            "prediction": index,
            "class": names[index] if names else None,
            "probability": round(probability, 6) if np.isfinite(probability) else None,
        }
        for index, probability in zip(index_B.tolist(), probability_B.tolist(), strict=True)
    ]


def looks_of(
    view: View,
    maps: Maps,
    placements: Sequence[Placement],
    predictions: Sequence[Mapping[str, Any]],
    films: Sequence[Mapping[str, NDArray[Any]] | None],
) -> list[Look]:
    """What is to be drawn of each image of a batch.

    Args:
        view: that made the maps.
        maps: of the batch.
        placements: of its images.
        predictions: of its images, as `predictions_of`.
        films: of its images, see `Look`.
    """
    heatmaps_Bhw, raw_Bhw = (x.detach().float().cpu().numpy() for x in (maps.heatmaps, maps.raw))
    glimpses = [None] * len(placements) if maps.boxes is None else maps.boxes.cpu().numpy()
    looks = []
    for place, placement in enumerate(placements):
        found: Found = ([], [], None)
        if isinstance(maps.output, (list, tuple)):  # as a detector's is
            found = found_of(view.class_names, maps.output, place, placement)
        boxes, labels, maps_Nhw = found
        look = Look(
            view.name or maps.method,
            said(predictions[place]),
            heatmaps_Bhw[place],
            raw_Bhw[place],
            placement,
            boxes,
            labels,
            glimpses[place],
            films[place],
            view.class_names,
            maps_Nhw,
        )
        looks.append(look)
    return looks


def said(prediction: Mapping[str, Any]) -> str:
    """`daisy 0.93`, or `class 3 0.93` where classes have no names."""
    if prediction["prediction"] is None:
        return ""
    name = prediction["class"] or f"class {prediction['prediction']}"
    return name if prediction["probability"] is None else f"{name} {prediction['probability']:.2f}"
