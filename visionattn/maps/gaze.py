"""Glimpses as heatmaps: how much was seen of every pixel.

Shapes: B batch, R looks at once, T glimpses of an image in all, N = T·S boxes, S scales, H × W the model's input.
"""

import torch
from torch import Tensor, nn

from visionattn.capture.recording import capture
from visionattn.capture.records import Record
from visionattn.capture.reductions import Nothing
from visionattn.capture.running import run
from visionattn.errors import UsageError
from visionattn.maps.fitting import fitting
from visionattn.maps.method import Explanation, Method, Target


class Gaze(Method):
    """How much of every pixel reaches the network through its glimpses.

    For networks that look through a `Retina`. Each value of the patch at scale s is the mean of f^s × f^s pixels, so

        raw(p) = Σ_t Σ_s |p ∩ box_ts| · area(box_t0) / area(box_ts),    area(box_t0) / area(box_ts) = f^(−2s)

    with |p ∩ box| the share of the pixel that a box covers: the derivative of the sum of all values seen by the pixel
    (of a retina that looks between pixels, the mean of it over the f^s × f^s pixels that are kept together). A glimpse
    spreads a total of S · h · w over its boxes, sharp in the middle and faint around; what falls outside the image is
    cut. The first fixation counts as the others do. The heatmap has the input's own resolution.

    It shows where the network looked and not what it made of it, so it explains no output in particular.
    """

    name = "gaze"

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        with capture(model, Nothing()) as records:
            output = run(model, images_BCHW)
            if not records.glimpses:
                raise UsageError(
                    f"gaze needs a network that looks through a Retina; this {type(model).__name__} does not."
                    f"{fitting(model, images_BCHW)}"
                )
        size = images_BCHW.shape[-2], images_BCHW.shape[-1]
        for record in records.glimpses:
            if record.grid != size or len(_boxes(record)) != len(images_BCHW):
                raise UsageError(
                    f"{record.name} looks at {len(_boxes(record))} images of {record.grid}, and the model was given "
                    f"{len(images_BCHW)} of {size}; where those lie in these is not known"
                )
        boxes = [_boxes(record) for record in records.glimpses]
        raw_BHW = torch.stack([coverage(boxes_BTS4, size) for boxes_BTS4 in boxes]).sum(0)
        most = max(boxes_BTS4.shape[2] for boxes_BTS4 in boxes)
        scales = [[min(scale, boxes_BTS4.shape[2] - 1) for scale in range(most)] for boxes_BTS4 in boxes]
        # a retina of fewer scales than another has its widest box more than once
        ordered = [boxes_BTS4[:, :, some] for boxes_BTS4, some in zip(boxes, scales, strict=True)]
        names = ", ".join(dict.fromkeys(record.name for record in records.glimpses))
        return Explanation(raw_BHW, output, None, f"glimpses of {names}", torch.cat(ordered, 1))


def coverage(boxes_BTS4: Tensor, size: tuple[int, int]) -> Tensor:
    """Sum what glimpses see of each pixel: (B, H, W); see `Gaze` for the equation.

    Args:
        boxes_BTS4: xyxy in pixels, the finest scale first.
        size: (H, W).
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
    """(B, T · R, S, 4): those of a turn behind each other."""
    assert record.boxes is not None
    return record.boxes.transpose(1, 2).flatten(1, 2)
