"""Metrics of a detector's heatmaps, one for each box: is the heatmap of a box hot inside that box?

Shapes: N boxes of an image, h × w cells of a heatmap, H × W pixels of the input; boxes xyxy in pixels.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from visionattn.capture import undisturbed
from visionattn.evaluation.localisation import energy, hit_share, inside, to_pixels
from visionattn.maps import BoxHeatmaps, detect

SAME_BOX = 0.5
"""Smallest IoU with which a box of the same class counts as the same box."""


def mass_ratio(heatmaps_Nhw: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """Return (fraction of each heatmap's sum inside its box) / (fraction of the image that the box covers), (N,) ≥ 0.

    A constant map has a ratio of 1. A map that is 0 inside its box has a ratio of 0.

    Args:
        heatmaps_Nhw: one heatmap per box, ≥ 0, each spanning the whole input.
        boxes_N4: xyxy in pixels of the input.
        size: (H, W) of the input.
    """
    object_NHW = inside(boxes_N4, size)
    share_N = object_NHW.float().mean((1, 2)).clamp(min=1 / (size[0] * size[1]))
    return energy(heatmaps_Nhw, object_NHW) / share_N


def box_pointing(heatmaps_Nhw: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """Return for each heatmap whether its peak lies in its box, (N,) in [0, 1].

    If several pixels are equally high, the value is the fraction of these pixels that lie inside the box. The arguments
    are as for `mass_ratio`.
    """
    return hit_share(heatmaps_Nhw, inside(boxes_N4, size))


def score_drop(
    detector: nn.Module,
    images_BCHW: Tensor,
    maps: Sequence[BoxHeatmaps],
    *,
    fraction: float = 0.1,
    batch_size: int = 32,
) -> list[Tensor]:
    """Return the fraction of each box's score that is lost when the hottest pixels of its heatmap are removed.

        drop = (score − score after) / score

    Removed pixels get the image's mean colour. The score after removal is the highest score of a box of the same class
    that overlaps the original box with an IoU of at least 0.5; it is 0 if there is no such box.

    Args:
        detector: the detector that the heatmaps explain; see `visionattn.maps.boxes.box_method`.
        images_BCHW: the images, normalised for the detector.
        maps: the heatmaps of each image, as a `BoxMethod` returns them.
        fraction: fraction of the pixels to remove, in (0, 1).
        batch_size: perturbed images in one forward pass.

    Returns:
        The drops (N,) of each image: at most 1, and below 0 where the score rises.

    Raises:
        UsageError: the model is not a detector.
    """
    size = images_BCHW.shape[2], images_BCHW.shape[3]
    count = max(1, round(fraction * size[0] * size[1]))
    drops = []
    with undisturbed(detector) as bare:
        for image_CHW, explained in zip(images_BCHW, maps, strict=True):
            after_N = torch.zeros_like(explained.scores)
            mean_C11 = image_CHW.mean((1, 2), keepdim=True)
            for start in range(0, len(explained.scores), batch_size):
                rows = slice(start, start + batch_size)
                heat_NS = to_pixels(explained.heatmaps[rows], size).flatten(1)
                gone_NS = torch.zeros_like(heat_NS, dtype=torch.bool)
                gone_NS.scatter_(1, heat_NS.topk(count, dim=1).indices, True)
                changed = torch.where(gone_NS.view(-1, 1, *size), mean_C11, image_CHW)
                for number, detections in enumerate(detect(bare, changed), start=start):
                    again = score_again([detections], explained.boxes[number], int(explained.labels[number]))
                    after_N[number] = again[0]
            drops.append((explained.scores - after_N) / explained.scores.clamp(min=1e-6))
    return drops


def score_again(output: Sequence[Mapping[str, Tensor]], box_4: Tensor, label: int) -> Tensor:
    """Return the score of one box in other detections, (B,): 0 where it is not found.

    The score is the highest of a box of the same class that overlaps the box with an IoU of at least `SAME_BOX`.

    Args:
        output: a detector's output for a batch, see `visionattn.maps.boxes.box_method`.
        box_4: xyxy in pixels of the input.
        label: its class.
    """
    scores = []
    for found in output:
        same_N = (found["labels"] == label) & (box_iou(box_4[None], found["boxes"].to(box_4))[0] >= SAME_BOX)
        scores.append((found["scores"].to(box_4) * same_N).amax() if len(same_N) else box_4.new_zeros(()))
    return torch.stack(scores)
