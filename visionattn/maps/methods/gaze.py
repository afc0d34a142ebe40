"""Heatmaps of glimpses: how much of every pixel a glimpse network reads.

Shapes: B batch, R simultaneous glimpses, T glimpses of an image in total, S scales, N = T·S boxes, H × W the model's
input.
"""

import torch
from torch import Tensor, nn

from visionattn.capture import NoWeights, Record, Survey, capture, run, survey_images
from visionattn.errors import UsageError
from visionattn.maps.method import Explanation, Method, Target, fitting


class Gaze(Method):
    """How much of every pixel reaches the network through its glimpses.

    For networks with a `Retina`. Glimpse t reads an h × w patch from the box box_ts at each scale s = 0 … S − 1. Each
    value of this patch is the mean of f^s × f^s pixels, where f is the retina's `factor`, so

        raw(p) = Σ_t Σ_s |p ∩ box_ts| · area(box_t0) / area(box_ts),    area(box_t0) / area(box_ts) = f^(−2s)

    where |p ∩ box| is the fraction of the pixel p that a box covers. raw(p) is the derivative of the sum of all patch
    values with respect to the pixel. (For a retina that interpolates between pixels, raw(p) is the mean of this
    derivative over the f^s × f^s pixels that are averaged together.) A glimpse spreads a total of S · h · w over its
    boxes, with the highest values in the middle. The part of a box outside the image is cut off. The first glimpse has
    the same weight as the others. The heatmap has the resolution of the input.

    The heatmap shows which pixels the network read, but not how they affected an output. So no output is explained.
    """

    name = "gaze"
    needs = "glimpses"
    cost = "a forward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(survey.glimpses)

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        with capture(model, NoWeights(), strict=True) as records:
            output = run(model, images_BCHW)
            if not records.glimpses:
                raise UsageError(
                    f"gaze needs a network that looks through a Retina; this {type(model).__name__} has none."
                    f"{fitting(survey_images(model, images_BCHW))}"
                )
        size = images_BCHW.shape[-2], images_BCHW.shape[-1]
        for record in records.glimpses:
            if record.grid != size or len(_boxes(record)) != len(images_BCHW):
                raise UsageError(
                    f"{record.name} looks at {len(_boxes(record))} images of {record.grid}, but the model was called "
                    f"with {len(images_BCHW)} images of {size}; gaze needs a retina that looks at the model's own input"
                )
        boxes = [_boxes(record) for record in records.glimpses]
        raw_BHW = torch.stack([coverage(boxes_BTS4, size) for boxes_BTS4 in boxes]).sum(0)
        max_scales = max(boxes_BTS4.shape[2] for boxes_BTS4 in boxes)
        # a retina with fewer scales than another repeats its widest box
        scales = [[min(scale, boxes_BTS4.shape[2] - 1) for scale in range(max_scales)] for boxes_BTS4 in boxes]
        ordered = [boxes_BTS4[:, :, indices] for boxes_BTS4, indices in zip(boxes, scales, strict=True)]
        names = ", ".join(dict.fromkeys(record.name for record in records.glimpses))
        return Explanation(raw_BHW, output, None, f"glimpses of {names}", torch.cat(ordered, 1))


def coverage(boxes_BTS4: Tensor, size: tuple[int, int]) -> Tensor:
    """Return how much of each pixel glimpses read, (B, H, W) ≥ 0; see `Gaze` for the equation.

    Args:
        boxes_BTS4: boxes of the glimpses, xyxy in pixels, the finest scale first.
        size: (H, W) of the image.
    """
    sides_BTS2 = boxes_BTS4[..., 2:] - boxes_BTS4[..., :2]
    area_BTS = sides_BTS2.prod(-1)
    weight_BN = (area_BTS[..., :1] / area_BTS).flatten(1)
    boxes_BN4 = boxes_BTS4.flatten(1, 2)
    shares = []
    for axis, count in ((1, size[0]), (0, size[1])):
        edge_n = torch.arange(count, device=boxes_BTS4.device, dtype=boxes_BTS4.dtype)
        first_BN1, last_BN1 = boxes_BN4[..., axis, None], boxes_BN4[..., axis + 2, None]
        shares.append((torch.minimum(last_BN1, edge_n + 1) - torch.maximum(first_BN1, edge_n)).clamp(min=0))
    rows_BNH, columns_BNW = shares
    return (rows_BNH * weight_BN[..., None]).mT @ columns_BNW


def _boxes(record: Record) -> Tensor:
    """Return the boxes of a record in time order, (B, T, S, 4); simultaneous glimpses are adjacent."""
    assert record.boxes is not None
    return record.boxes.transpose(1, 2).flatten(1, 2)
