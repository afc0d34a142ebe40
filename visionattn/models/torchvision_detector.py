"""torchvision's detectors as one of ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from visionattn.models.detector import Detections, Detector
from visionattn.models.pyramid import FeaturePyramid


class TorchvisionDetector(Detector):
    """FCOS, RetinaNet or Faster R-CNN of torchvision, on a `FeaturePyramid`.

        network:
          class_path: visionattn.models.TorchvisionDetector
          init_args:
            detector: torchvision.models.detection.FCOS
            features: {class_path: visionattn.models.FeaturePyramid, init_args: {backbone: resnet50}}
            num_classes: 3

    Images are neither normalised nor resized again: the data has done it.

    Args:
        detector: makes the detector from a backbone and a number of classes, `torchvision.models.detection.FCOS`,
            `RetinaNet` or `FasterRCNN`, with what else it takes. Where it takes anchors and was given none, they are a
            square of four strides, of three scales for RetinaNet, and as high as wide, half or twice.
        features: the pyramid.
        num_classes: K, without a background.
    """

    def __init__(
        self, detector: Callable[[nn.Module, int], nn.Module], features: FeaturePyramid, num_classes: int
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        kind = getattr(detector, "func", detector)
        asked = getattr(detector, "keywords", {})
        # Faster R-CNN's class 0 is the background
        self.shift = 0 if kind in (FCOS, RetinaNet) else 1
        options = _fitted(kind, features.strides)
        options = {name: made for name, made in options.items() if asked.get(name) is None}
        self.detector = detector(_Named(features), num_classes + self.shift, **options)
        self.detector.transform = _AsTheyAre()

    def forward(self, images_BCHW: Tensor) -> list[Detections]:
        found: list[Detections] = self.detector(list(images_BCHW))
        return [
            {"boxes": some["boxes"][:100], "scores": some["scores"][:100], "labels": some["labels"][:100] - self.shift}
            for some in found
        ]

    def losses(self, images_BCHW: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        targets = [{"boxes": some, "labels": label + self.shift} for some, label in zip(boxes, labels, strict=True)]
        return self.detector(list(images_BCHW), targets)


def _fitted(kind: Any, strides: Sequence[int]) -> dict[str, Any]:
    """Anchors for the maps of these strides, and for Faster R-CNN which maps regions are taken from."""
    count = len(strides)
    if kind is FCOS:
        return {"anchor_generator": AnchorGenerator(tuple((stride,) for stride in strides), ((1.0,),) * count)}
    shapes = ((0.5, 1.0, 2.0),) * count
    if kind is RetinaNet:
        sides = tuple(tuple(round(4 * stride * 2 ** (step / 3)) for step in range(3)) for stride in strides)
        return {"anchor_generator": AnchorGenerator(sides, shapes)}
    sides = tuple((4 * stride,) for stride in strides)
    pool = MultiScaleRoIAlign([str(place) for place in range(count)], output_size=7, sampling_ratio=2)
    return {"rpn_anchor_generator": AnchorGenerator(sides, shapes), "box_roi_pool": pool}


class _Named(nn.Module):
    """A pyramid in the form that torchvision's detectors take."""

    def __init__(self, features: FeaturePyramid) -> None:
        super().__init__()
        self.features = features
        self.out_channels = features.channels

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        return {str(place): x for place, x in enumerate(self.features(x_BCHW))}


class _AsTheyAre(nn.Module):
    """In place of torchvision's own normalisation and resizing, and of its way back."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        return ImageList(torch.stack(images), [(image.shape[1], image.shape[2]) for image in images]), targets

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        return result
