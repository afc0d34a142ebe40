"""torchvision's detectors as a `Detector`."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from visionattn.models.detector import Detections, Detector
from visionattn.models.detectors.feature_pyramid import FeaturePyramid


class TorchvisionDetector(Detector):
    """torchvision's FCOS, RetinaNet or Faster R-CNN on a `FeaturePyramid`.

        network:
          class_path: visionattn.models.TorchvisionDetector
          init_args:
            detector: torchvision.models.detection.FCOS
            features: {class_path: visionattn.models.FeaturePyramid, init_args: {backbone: resnet50}}
            num_classes: 3

    torchvision's own normalisation and resizing are disabled, since the data module does both.

    Args:
        detector: function that makes the detector from a backbone and a number of classes:
            `torchvision.models.detection.FCOS`, `RetinaNet` or `FasterRCNN`, with its further arguments. If its anchors
            do not match the number of maps, they are replaced. The new anchors are four strides wide (FCOS: one), with
            the aspect ratios 1/2, 1 and 2 (FCOS: 1); RetinaNet gets each of them at three scales.
        features: the pyramid.
        num_classes: K, without a background class.
    """

    def __init__(
        self, detector: Callable[[nn.Module, int], nn.Module], features: FeaturePyramid, num_classes: int
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        backbone = _Named(features)
        made: Any = detector(backbone, num_classes)  # torchvision's classes share no type
        self.shift = int(not isinstance(made, (FCOS, RetinaNet)))
        if self.shift:  # class 0 of Faster R-CNN is the background
            made = detector(backbone, num_classes + 1)
        _fit(made, features.strides)
        heads = [made.rpn.head, made.roi_heads.box_predictor] if self.shift else [made.head]
        for head in heads:
            head.register_forward_hook(_to_float)
        made.transform = _NoTransform()
        self.detector = made

    def forward(self, images_BCHW: Tensor) -> list[Detections]:
        results: list[Detections] = self.detector(list(images_BCHW))
        return [
            {
                "boxes": image["boxes"][:100],
                "scores": image["scores"][:100],
                "labels": image["labels"][:100] - self.shift,
            }
            for image in results
        ]

    def losses(self, images_BCHW: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        targets = [
            {"boxes": boxes_N4, "labels": labels_N + self.shift}
            for boxes_N4, labels_N in zip(boxes, labels, strict=True)
        ]
        return self.detector(list(images_BCHW), targets)


def _fit(made: Any, strides: Sequence[int]) -> None:  # `made` is one of torchvision's detectors
    """Replace anchors and region pooling that do not match the number of maps; use torchvision's aspect ratios."""
    count = len(strides)
    holder = made.rpn if hasattr(made, "rpn") else made
    sides: tuple[tuple[int, ...], ...]
    shapes: tuple[float, ...] = (0.5, 1.0, 2.0)
    if len(holder.anchor_generator.sizes) != count:
        if isinstance(made, FCOS):
            sides, shapes = tuple((stride,) for stride in strides), (1.0,)
        elif isinstance(made, RetinaNet):
            sides = tuple(tuple(round(4 * stride * 2 ** (step / 3)) for step in range(3)) for stride in strides)
        else:
            sides = tuple((4 * stride,) for stride in strides)
        holder.anchor_generator = AnchorGenerator(sides, (shapes,) * count)
    if hasattr(made, "roi_heads"):
        pool = made.roi_heads.box_roi_pool
        if len(pool.featmap_names) != count:
            names = [str(place) for place in range(count)]
            made.roi_heads.box_roi_pool = MultiScaleRoIAlign(names, pool.output_size, pool.sampling_ratio)


def _to_float(module: nn.Module, args: object, out: Any) -> Any:
    """Forward hook of a head: convert its outputs to float32, since pixels need more than the 8 bits of bfloat16."""
    if isinstance(out, Tensor):
        return out.float()
    values = {name: _to_float(module, args, value) for name, value in out.items()} if isinstance(out, dict) else None
    return values or type(out)(_to_float(module, args, value) for value in out)


class _Named(nn.Module):
    """A pyramid in the form of torchvision's backbones: a dict of maps, and `out_channels`."""

    def __init__(self, features: FeaturePyramid) -> None:
        super().__init__()
        self.features = features
        self.out_channels = features.channels
        self.strides = features.strides

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        return {str(place): x for place, x in enumerate(self.features(x_BCHW))}


class _NoTransform(nn.Module):
    """Replaces torchvision's transform, which normalises and resizes images and maps boxes back."""

    def forward(self, images: list[Tensor], targets: object = None) -> tuple[ImageList, object]:
        return ImageList(torch.stack(images), [(image.shape[1], image.shape[2]) for image in images]), targets

    def postprocess(
        self, result: list[Detections], image_shapes: object, original_image_sizes: object
    ) -> list[Detections]:
        """Return the boxes unchanged; torchvision calls this method."""
        return result
