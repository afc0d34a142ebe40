"""The pointing game: does the peak of a heatmap lie on the object?

Shapes: B images, h × w cells of a heatmap, boxes xyxy in pixels of the model's input.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def hit_share(heatmaps_Bhw: Tensor, boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Tell how much of each heatmap's peak lies in its box, (B,) in [0, 1].

    The heatmap is first interpolated bilinearly to the input's pixels. The share is 0 or 1 where one pixel is highest;
    of equal peaks it is the share of them inside, what a draw among them would hit on average. So a constant map
    scores as a uniform guess does.

    Args:
        heatmaps_Bhw: of any resolution, each spanning the whole input.
        boxes_B4: a pixel is inside where its centre is.
        size: (height, width) of the input.
    """
    fine_BHW = F.interpolate(heatmaps_Bhw[:, None].float(), size=size, mode="bilinear", align_corners=False)[:, 0]
    top_BHW = fine_BHW == fine_BHW.amax((1, 2), keepdim=True)
    y_H = torch.arange(size[0], device=boxes_B4.device) + 0.5
    x_W = torch.arange(size[1], device=boxes_B4.device) + 0.5
    rows_BH = (y_H >= boxes_B4[:, 1:2]) & (y_H <= boxes_B4[:, 3:4])
    columns_BW = (x_W >= boxes_B4[:, 0:1]) & (x_W <= boxes_B4[:, 2:3])
    inside_BHW = rows_BH[:, :, None] & columns_BW[:, None, :]
    return (top_BHW & inside_BHW).sum((1, 2)) / top_BHW.sum((1, 2))


def pointing(heatmaps_Bhw: Tensor, boxes_B4: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Play the pointing game (Zhang et al. 2016, 1608.00507, section 4.2, without its margin of 15 pixels).

    Returns:
        (B,) each: `pointing` 1 where the peak lies in the box (see `hit_share`); `centre` the same for a guess at the
        middle of the input; `chance` the share of the input that the box covers, which a uniform guess hits.
    """
    height, width = size
    middle_2 = torch.tensor([width / 2, height / 2], device=boxes_B4.device)
    centre_B = ((boxes_B4[:, :2] <= middle_2) & (boxes_B4[:, 2:] >= middle_2)).all(1)
    areas_B = (boxes_B4[:, 2:] - boxes_B4[:, :2]).clamp(min=0).prod(1)
    return {
        "pointing": hit_share(heatmaps_Bhw, boxes_B4, size),
        "centre": centre_B.float(),
        "chance": areas_B / (height * width),
    }
