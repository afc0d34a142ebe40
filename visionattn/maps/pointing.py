"""The pointing game: does the peak of a heatmap lie on the object?

Shapes: B images, h × w cells of a heatmap, boxes xyxy in pixels of the model's input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def peaks(heatmaps_Bhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Find the place (x, y), in pixels of the input, of each heatmap's highest value, (B, 2).

    The heatmap is first interpolated bilinearly to the input's pixels. Of several equal peaks the mean is taken, so that a constant map
    points at the centre and gains nothing from the order of its pixels.

    Args:
        heatmaps_Bhw: of any resolution, each spanning the whole input.
        size: (height, width) of the input.
    """
    fine_BHW = F.interpolate(heatmaps_Bhw[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    top_BHW = (fine_BHW == fine_BHW.amax((1, 2), keepdim=True)).float()
    y_H = torch.arange(size[0], device=top_BHW.device) + 0.5
    x_W = torch.arange(size[1], device=top_BHW.device) + 0.5
    count_B = top_BHW.sum((1, 2))
    return torch.stack([(top_BHW.sum(1) @ x_W) / count_B, (top_BHW.sum(2) @ y_H) / count_B], 1)


def inside(points_B2: Tensor, boxes_B4: Tensor) -> Tensor:
    """Tell which points (x, y) lie in their box, edges included, (B,) bool."""
    return ((points_B2 >= boxes_B4[:, :2]) & (points_B2 <= boxes_B4[:, 2:])).all(1)


def pointing(heatmaps_Bhw: Tensor, boxes_B4: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Play the pointing game (Zhang et al. 2016, 1608.00507, section 4.2, without its margin of 15 pixels).

    Returns:
        (B,) each: `pointing` 1 where the peak lies in the box; `centre` the same for a guess at the middle of the input;
        `chance` the share of the input that the box covers, which a uniform guess hits.
    """
    height, width = size
    centre_B2 = torch.tensor([width / 2, height / 2], device=boxes_B4.device).expand(len(boxes_B4), 2)
    areas_B = (boxes_B4[:, 2:] - boxes_B4[:, :2]).clamp(min=0).prod(1)
    return {
        "pointing": inside(peaks(heatmaps_Bhw, size), boxes_B4).float(),
        "centre": inside(centre_B2, boxes_B4).float(),
        "chance": areas_B / (height * width),
    }
