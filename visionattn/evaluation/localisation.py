"""Localisation: does a heatmap lie on the object? Pointing game, energy inside the object, and overlap.

Shapes: B images, h × w cells of a heatmap, H × W pixels of the model's input, T thresholds; boxes xyxy in pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = 100


def to_pixels(heatmaps_Bhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate heatmaps bilinearly to the (height, width) of the input: (B, H, W) float32.

    The interpolation runs in double precision, so that cells with equal values give pixels with equal values.
    """
    fine_B1HW = F.interpolate(heatmaps_Bhw[:, None].double(), size=size, mode="bilinear", align_corners=False)
    return fine_B1HW[:, 0].float()


def inside(boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Return masks of boxes, (B, H, W) bool: true for pixels whose centre lies in the box.

    Args:
        boxes_B4: xyxy in pixels.
        size: (H, W).
    """
    y_H = torch.arange(size[0], device=boxes_B4.device) + 0.5
    x_W = torch.arange(size[1], device=boxes_B4.device) + 0.5
    rows_BH = (y_H >= boxes_B4[:, 1:2]) & (y_H <= boxes_B4[:, 3:4])
    columns_BW = (x_W >= boxes_B4[:, 0:1]) & (x_W <= boxes_B4[:, 2:3])
    return rows_BH[:, :, None] & columns_BW[:, None, :]


def hit_share(heatmaps_Bhw: Tensor, object_BHW: Tensor) -> Tensor:
    """Return the fraction of each heatmap's highest pixels that lie on its object, (B,) in [0, 1].

    If one pixel is highest, the fraction is 0 or 1. If several pixels are equally high, the fraction is the probability
    that a random choice among them hits the object. So a constant map scores like a uniform guess.

    Args:
        heatmaps_Bhw: heatmaps of any resolution, each spanning the whole input.
        object_BHW: bool, true on the object; for a box see `inside`.
    """
    fine_BHW = to_pixels(heatmaps_Bhw, _size(object_BHW))
    top_BHW = fine_BHW == fine_BHW.amax((1, 2), keepdim=True)
    return (top_BHW & object_BHW).sum((1, 2)) / top_BHW.sum((1, 2))


def pointing(heatmaps_Bhw: Tensor, boxes_B4: Tensor, size: tuple[int, int]) -> dict[str, Tensor]:
    """Play the pointing game (Zhang et al. 2016, 1608.00507, section 4.2) without the paper's margin of 15 pixels.

    Args:
        heatmaps_Bhw: heatmaps of any resolution, each spanning the whole input.
        boxes_B4: the objects' boxes, xyxy in pixels of the input.
        size: (H, W) of the input.

    Returns:
        A dict of three tensors (B,) in [0, 1]: `pointing` is 1 where the peak lies in the box (see `hit_share`);
        `centre` is 1 where the centre of the input lies in the box; `chance` is the fraction of the input that the box
        covers, the expected score of a uniform guess.
    """
    height, width = size
    middle_2 = torch.tensor([width / 2, height / 2], device=boxes_B4.device)
    centre_B = ((boxes_B4[:, :2] <= middle_2) & (boxes_B4[:, 2:] >= middle_2)).all(1)
    areas_B = (boxes_B4[:, 2:] - boxes_B4[:, :2]).clamp(min=0).prod(1)
    return {
        "pointing": hit_share(heatmaps_Bhw, inside(boxes_B4, size)),
        "centre": centre_B.float(),
        "chance": areas_B / (height * width),
    }


def energy(heatmaps_Bhw: Tensor, object_BHW: Tensor) -> Tensor:
    """Return the fraction of each heatmap's sum that lies on its object, (B,) in [0, 1].

    This is the energy-based pointing game (Wang et al. 2020, 1910.01279, section 4.3). A heatmap of zeros scores like a
    constant heatmap: the fraction of the input that the object covers.

    Args:
        heatmaps_Bhw: heatmaps ≥ 0 of any resolution, each spanning the whole input.
        object_BHW: bool, true on the object; for a box see `inside`.
    """
    fine_BHW = to_pixels(heatmaps_Bhw, _size(object_BHW)).double()
    fine_BHW = torch.where((fine_BHW == 0).all(2, keepdim=True).all(1, keepdim=True), 1, fine_BHW)
    return ((fine_BHW * object_BHW).sum((1, 2)) / fine_BHW.sum((1, 2))).float()


def overlap(heatmaps_Bhw: Tensor, object_BHW: Tensor, *, thresholds: int = THRESHOLDS) -> Tensor:
    """Return the intersection over union of the object and {heatmap ≥ t}, for t = 0, 1/T … (T − 1)/T: (B, T).

    After Choe et al. 2020 (2001.07437, section 4). For a method, use the threshold with the highest mean over all
    images; the best threshold of each single image would overstate the overlap. Deviations from the paper: the result
    is the IoU instead of the fraction of images above a given IoU. A box is compared with all pixels above the
    threshold, instead of with the box around the largest connected part of these pixels.

    Args:
        heatmaps_Bhw: heatmaps in [0, 1] of any resolution, each spanning the whole input.
        object_BHW: bool, true on the object; for a box see `inside`.
        thresholds: T.
    """
    fine_BN = to_pixels(heatmaps_Bhw, _size(object_BHW)).flatten(1)
    object_BN = object_BHW.flatten(1)
    edges_T = torch.arange(thresholds, device=fine_BN.device) / thresholds
    level_BN = torch.bucketize(fine_BN, edges_T, right=True) - 1  # the highest threshold that a pixel reaches
    empty_BT = fine_BN.new_zeros(len(fine_BN), thresholds)
    above_BT, common_BT = (
        empty_BT.scatter_add(1, level_BN.clamp(min=0), counted_BN.float()).flip(1).cumsum(1).flip(1)
        for counted_BN in (torch.ones_like(object_BN), object_BN)
    )
    union_BT = above_BT + object_BN.sum(1, keepdim=True) - common_BT
    return common_BT / union_BT.clamp(min=1)


def _size(object_BHW: Tensor) -> tuple[int, int]:
    return object_BHW.shape[1], object_BHW.shape[2]
