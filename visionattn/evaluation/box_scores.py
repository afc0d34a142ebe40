"""Is the heatmap of a box about that box?

Shapes: N boxes of an image, h × w cells of a heatmap, H × W pixels of the input; boxes xyxy in pixels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from visionattn.capture.running import undisturbed
from visionattn.evaluation.localisation import energy, hit_share, inside, to_pixels
from visionattn.maps.boxes import BoxMaps, detect


def mass_ratio(heatmaps_Nhw: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """(N,): share of each heatmap's mass inside of its box ÷ share of the image that the box covers.

    1 for a map that knows nothing of the box, as a constant one; 0 where all lies outside.
    """
    object_NHW = inside(boxes_N4, size)
    share_N = object_NHW.float().mean((1, 2)).clamp(min=1 / (size[0] * size[1]))
    return energy(heatmaps_Nhw, object_NHW) / share_N


def box_pointing(heatmaps_Nhw: Tensor, boxes_N4: Tensor, size: tuple[int, int]) -> Tensor:
    """(N,): whether each heatmap's peak lies in its box; see `localisation.hit_share`."""
    return hit_share(heatmaps_Nhw, inside(boxes_N4, size))


def score_drop(
    detector: nn.Module, images_BCHW: Tensor, maps: Sequence[BoxMaps], *, share: float = 0.1, batch_size: int = 32
) -> list[Tensor]:
    """How much of each box's score goes when the hottest pixels of its heatmap do.

        drop = (score − score without) / score

    The hottest `share` of the pixels are set to the image's mean colour; the score without is the best among boxes of
    the same class that overlap the box by an IoU of .5 or more, 0 where there is none.

    Args:
        detector, images_BCHW: as for the method.
        maps: what the method returned.
        share: of the pixels, in (0, 1).
        batch_size: changed images in one forward pass.

    Returns:
        (N,) of each image; ≤ 1, below 0 where the score rises.
    """
    size = images_BCHW.shape[2], images_BCHW.shape[3]
    count = max(1, round(share * size[0] * size[1]))
    drops = []
    with undisturbed(detector) as bare:
        for image_CHW, some in zip(images_BCHW, maps, strict=True):
            left_N = torch.zeros_like(some.scores)
            mean_C11 = image_CHW.mean((1, 2), keepdim=True)
            for start in range(0, len(some.scores), batch_size):
                rows = slice(start, start + batch_size)
                heat_NS = to_pixels(some.heatmaps[rows], size).flatten(1)
                gone_NS = torch.zeros_like(heat_NS, dtype=torch.bool)
                gone_NS.scatter_(1, heat_NS.topk(count, dim=1).indices, True)
                changed = torch.where(gone_NS.view(-1, 1, *size), mean_C11, image_CHW)
                for number, found in enumerate(detect(bare, changed), start=start):
                    same = found["labels"] == some.labels[number]
                    overlap = box_iou(some.boxes[number : number + 1], found["boxes"])[0]
                    scores = found["scores"][same & (overlap >= 0.5)]
                    left_N[number] = scores.max() if len(scores) else 0
            drops.append((some.scores - left_N) / some.scores.clamp(min=1e-6))
    return drops
