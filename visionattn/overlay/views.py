"""One way to look at images: a model, its method, and what the model's answers are called."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from visionattn.data.placement import Placement, Preprocess
from visionattn.errors import DataError, UsageError, nearest
from visionattn.maps.base import Maps, scores_of
from visionattn.maps.boxes import SURE, AllBoxes, default_box_method
from visionattn.models.detector import Detector

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
        if self.method is not None:
            return self
        if detects(self.model):
            return replace(self, method=AllBoxes(default_box_method(self.model)))
        from visionattn.maps.choose import default_method

        return replace(self, method=default_method(self.model))

    @functools.cached_property
    def convolves(self) -> bool:
        """Whether the model is made of convolutions, not one that only cuts patches by them."""
        return sum(isinstance(module, nn.Conv2d) for module in self.model.modules()) > 4

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


def boxes_of(view: View, output: Any, place: int, placement: Placement) -> tuple[list[list[float]], list[str]]:
    """What a detector is sure of in one image, in pixels of the source: it returns a dict of boxes an image."""
    one = output[place] if isinstance(output, (list, tuple)) and place < len(output) else None
    if not isinstance(one, dict) or not {"boxes", "scores", "labels"} <= one.keys():
        return [], []
    sure = (one["scores"] >= SURE).cpu()
    boxes_N4 = placement.boxes_to_source(one["boxes"].detach().float().cpu()[sure].numpy())
    labels = [
        f"{view.class_names[label] if label < len(view.class_names) else f'class {label}'} {score:.2f}"
        for label, score in zip(one["labels"].cpu()[sure].tolist(), one["scores"].cpu()[sure].tolist(), strict=True)
    ]
    return [[round(edge, 1) for edge in box] for box in boxes_N4.tolist()], labels


def maps_of(output: Any, place: int) -> NDArray[np.float32] | None:
    """The heatmaps of the boxes of one image, (N, h, w), in their order; None where there are none of boxes."""
    one = output[place] if isinstance(output, list) else None
    return one["maps"].float().cpu().numpy() if isinstance(one, dict) and "maps" in one else None


def said(prediction: Mapping[str, Any]) -> str:
    """`daisy 0.93`, or `class 3 0.93` where classes have no names."""
    if prediction["prediction"] is None:
        return ""
    name = prediction["class"] or f"class {prediction['prediction']}"
    return name if prediction["probability"] is None else f"{name} {prediction['probability']:.2f}"
