"""A dense detector: every place of a feature pyramid says what object it lies in, and how far away its edges are.

Shapes: B batch, C channels, h × w a map, P places of all maps, N boxes of an image, K classes; boxes xyxy in pixels.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import generalized_box_iou_loss

from visionattn.models.detector import Detections, Detector, detections, padded
from visionattn.models.pyramid import FeaturePyramid


class Dense(NamedTuple):
    """What a dense head says: logits (B, P, K), boxes (B, P, 4), and of each place its centre and stride (P, 3)."""

    logits: Tensor
    boxes: Tensor
    places: Tensor


class DenseHead(nn.Module):
    """FCOS's head on the maps of a pyramid, the same for all of them (Tian et al. 2019, 1904.01355, section 3).

        left, top, right, bottom = stride · exp(scale_s · conv(x)),    logits = conv(x')

    x and x' are what two towers of 3 × 3 convolutions make of a map. A place is positive for a box where it lies within
    `radius` strides of the box's centre (the authors' later centre sampling) and in it, and the farthest edge is in
    (4 s, 8 s] away for its stride s (the finest map takes all that is nearer, the coarsest all that is farther); of
    several boxes the smallest counts.

        L = (Σ_places |y − σ(logit)|² · BCE(σ(logit), y) + 2 Σ_positive (1 − GIoU)) / positives

    Deviations from the paper: the class is asked for with y the IoU of the place's own box instead of 1, and weighted
    by the distance to y (quality focal loss, Li et al. 2020, 2006.04388, eq. 2), which takes the place of the
    centre-ness branch; a box for which no map whose range fits has a place goes to the nearest map that has one.

    Args:
        num_classes: K.
        strides: of the maps.
        channels: C of the maps.
        depth: convolutions of a tower.
        radius: in strides.
    """

    def __init__(
        self, num_classes: int, strides: Sequence[int], channels: int, *, depth: int = 2, radius: float = 1.5
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.strides = tuple(strides)
        self.radius = radius
        self.class_tower, self.box_tower = (nn.Sequential(*(_block(channels) for _ in range(depth))) for _ in range(2))
        self.classify = nn.Conv2d(channels, num_classes, 3, padding=1)
        self.regress = nn.Conv2d(channels, 4, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(len(self.strides)))
        for conv in (self.classify, self.regress):
            nn.init.normal_(conv.weight, std=0.01)
        assert self.classify.bias is not None
        nn.init.constant_(self.classify.bias, -math.log(99))  # a score of .01 for everything, section 4 of 1708.02002
        assert self.regress.bias is not None
        nn.init.constant_(self.regress.bias, math.log(3.0))  # boxes of six strides, the middle of a map's range

    def forward(self, maps: Sequence[Tensor]) -> Dense:
        logits, sides, places = [], [], []
        for x_BChw, stride, scale in zip(maps, self.strides, self.scales, strict=True):
            logits.append(self.classify(self.class_tower(x_BChw)).flatten(2).mT.float())
            # pixels need more than the eight bits of bfloat16
            raw_BP4 = self.regress(self.box_tower(x_BChw)).flatten(2).mT.float() * scale
            sides.append(stride * raw_BP4.clamp(max=8).exp())
            places.append(_places(x_BChw, stride))
        places_P3, sides_BP4 = torch.cat(places), torch.cat(sides, 1)
        centres_P2 = places_P3[:, :2]
        boxes_BP4 = torch.cat([centres_P2 - sides_BP4[..., :2], centres_P2 + sides_BP4[..., 2:]], -1)
        return Dense(torch.cat(logits, 1), boxes_BP4, places_P3)

    def losses(self, found: Dense, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """The terms of the loss: `class` and `box`."""
        boxes_BN4, labels_BN, there_BN = padded(boxes, labels)
        target_BP = self.assign(found.places, boxes_BN4, there_BN)
        image, place = (target_BP >= 0).nonzero(as_tuple=True)
        number = target_BP[image, place]
        count = max(1, len(image))
        predicted_M4 = found.boxes[image, place]
        if len(image):
            asked_M4 = boxes_BN4[image, number]
            quality_M = paired_iou(predicted_M4.detach(), asked_M4)
            box = 2 * generalized_box_iou_loss(predicted_M4, asked_M4, reduction="sum") / count
        else:
            quality_M, box = predicted_M4.new_zeros(0), predicted_M4.sum()
        goal_BPK = torch.zeros_like(found.logits)
        if len(image):
            goal_BPK[image, place, labels_BN[image, number]] = quality_M
        return {"class": quality_focal(found.logits, goal_BPK) / count, "box": box}

    def assign(self, places_P3: Tensor, boxes_BN4: Tensor, there_BN: Tensor) -> Tensor:
        """(B, P): the number of the box that each place is to find, or −1."""
        if not boxes_BN4.shape[1]:
            return torch.full((len(boxes_BN4), len(places_P3)), -1, device=places_P3.device)
        x_P, y_P, stride_P = places_P3.unbind(1)
        left, upper, right, lower = (edge[:, None] for edge in boxes_BN4.unbind(2))
        sides_BPN4 = torch.stack(
            [x_P[:, None] - left, y_P[:, None] - upper, right - x_P[:, None], lower - y_P[:, None]], -1
        )
        reach_P1 = self.radius * stride_P[:, None]
        central_BPN = ((x_P[:, None] - (left + right) / 2).abs() < reach_P1) & (
            (y_P[:, None] - (upper + lower) / 2).abs() < reach_P1
        )
        inside_BPN = central_BPN & (sides_BPN4.amin(-1) > 0) & there_BN[:, None]
        # how many octaves the farthest edge is outside of the map's range; 0 inside
        octave_BPN = torch.log2(sides_BPN4.amax(-1).clamp(min=1e-6) / stride_P[:, None]) - 2.5
        first, last = stride_P == self.strides[0], stride_P == self.strides[-1]
        octave_BPN = torch.where(first[:, None], octave_BPN.clamp(min=0), octave_BPN)
        octave_BPN = torch.where(last[:, None], octave_BPN.clamp(max=0), octave_BPN).abs()
        octave_BPN = (octave_BPN - 0.5).clamp(min=0)
        nearest_B1N = octave_BPN.masked_fill(~inside_BPN, torch.inf).amin(1, keepdim=True)
        fits_BPN = inside_BPN & (octave_BPN <= nearest_B1N)
        area_BN = (boxes_BN4[..., 2:] - boxes_BN4[..., :2]).prod(-1)
        area_BPN = area_BN[:, None].expand_as(fits_BPN).masked_fill(~fits_BPN, torch.inf)
        smallest_BP, number_BP = area_BPN.min(-1)
        return torch.where(smallest_BP.isfinite(), number_BP, -1)


class DenseDetector(Detector):
    """A `DenseHead` on a `FeaturePyramid`; overlapping boxes of a class are suppressed.

    Args:
        features: the pyramid.
        num_classes: K.
        depth: convolutions of the head's towers; FCOS has 4.
        nms: IoU above which the worse of two boxes of a class goes.
    """

    def __init__(self, features: FeaturePyramid, num_classes: int, *, depth: int = 2, nms: float = 0.6) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.nms = nms
        self.features = features
        self.head = DenseHead(num_classes, features.strides, features.channels, depth=depth)

    def forward(self, images_BCHW: Tensor) -> list[Detections]:
        found = self.head(self.features(images_BCHW))
        size = images_BCHW.shape[2], images_BCHW.shape[3]
        return detections(found.logits.sigmoid(), found.boxes, size, iou=self.nms)

    def losses(self, images_BCHW: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        return self.head.losses(self.head(self.features(images_BCHW)), boxes, labels)


def quality_focal(logits: Tensor, goal: Tensor) -> Tensor:
    """Quality focal loss, summed (Li et al. 2020, 2006.04388, eq. 2, β = 2): |y − σ|² · BCE(σ, y)."""
    weight = (goal - logits.sigmoid()).square()
    return (weight * F.binary_cross_entropy_with_logits(logits, goal, reduction="none")).sum()


def paired_iou(one_M4: Tensor, other_M4: Tensor) -> Tensor:
    """(M,): the IoU of the boxes of two lists, pair by pair."""
    upper, lower = torch.maximum(one_M4[:, :2], other_M4[:, :2]), torch.minimum(one_M4[:, 2:], other_M4[:, 2:])
    common = (lower - upper).clamp(min=0).prod(1)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (one_M4, other_M4)]
    return common / (areas[0] + areas[1] - common).clamp(min=1e-6)


def _places(x_BChw: Tensor, stride: int) -> Tensor:
    """(h w, 3): x, y and stride of the centre of each cell."""
    y_h = (torch.arange(x_BChw.shape[2], device=x_BChw.device) + 0.5) * stride
    x_w = (torch.arange(x_BChw.shape[3], device=x_BChw.device) + 0.5) * stride
    y_hw, x_hw = torch.meshgrid(y_h, x_w, indexing="ij")
    return torch.stack([x_hw, y_hw, torch.full_like(x_hw, stride)], -1).reshape(-1, 3)


def _block(channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.GroupNorm(channels // 8, channels), nn.ReLU()
    )
