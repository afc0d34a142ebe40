"""torchvision's detectors as one of ours."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import FCOS, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import MultiScaleRoIAlign

from visionattn.models.detectors.detector import Detections, Detector
from visionattn.models.detectors.feature_pyramid import FeaturePyramid


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
            `RetinaNet` or `FasterRCNN`, with what else it takes. Where its anchors are not for as many maps as there
            are, they become four strides wide, of three scales for RetinaNet, and as high as wide, half or twice.
        features: the pyramid.
        num_classes: K, without a background.
    """

    def __init__(
        self, detector: Callable[[nn.Module, int], nn.Module], features: FeaturePyramid, num_classes: int
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        backbone = _Named(features)
        made: Any = detector(backbone, num_classes)
        self.shift = int(not isinstance(made, (FCOS, RetinaNet)))
        if self.shift:  # Faster R-CNN's class 0 is the background
            made = detector(backbone, num_classes + 1)
        _fit(made, features.strides)
        heads = [made.rpn.head, made.roi_heads.box_predictor] if self.shift else [made.head]
        for head in heads:
            head.register_forward_hook(_to_float)
        made.transform = _AsTheyAre()
        self.detector = made

    def forward(self, images_BCHW: Tensor) -> list[Detections]:
        found: list[Detections] = self.detector(list(images_BCHW))
        return [
            {"boxes": some["boxes"][:100], "scores": some["scores"][:100], "labels": some["labels"][:100] - self.shift}
            for some in found
        ]

    def losses(self, images_BCHW: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        targets = [{"boxes": some, "labels": label + self.shift} for some, label in zip(boxes, labels, strict=True)]
        return self.detector(list(images_BCHW), targets)


def _fit(made: Any, strides: Sequence[int]) -> None:
    """Give a detector anchors for the maps of these strides, as many a place as it has, and regions from these maps."""
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


def _to_float(module: nn.Module, args: Any, out: Any) -> Any:
    """Pixels need more than the eight bits of bfloat16."""
    if isinstance(out, Tensor):
        return out.float()
    values = {name: _to_float(module, args, value) for name, value in out.items()} if isinstance(out, dict) else None
    return values or type(out)(_to_float(module, args, value) for value in out)


class _Named(nn.Module):
    """A pyramid in the form that torchvision's detectors take."""

    def __init__(self, features: FeaturePyramid) -> None:
        super().__init__()
        self.features = features
        self.out_channels = features.channels
        self.strides = features.strides

    def forward(self, x_BCHW: Tensor) -> dict[str, Tensor]:
        return {str(place): x for place, x in enumerate(self.features(x_BCHW))}


class _AsTheyAre(nn.Module):
    """In place of torchvision's own normalisation and resizing, and of its way back."""

    def forward(self, images: list[Tensor], targets: Any = None) -> tuple[ImageList, Any]:
        return ImageList(torch.stack(images), [(image.shape[1], image.shape[2]) for image in images]), targets

    def postprocess(self, result: Any, image_shapes: Any, original_image_sizes: Any) -> Any:
        return result
