"""Does a heatmap lie on the object? The pointing game, the energy inside, and the overlap at the best threshold.

Shapes: B images, h × w cells of a heatmap, H × W pixels of the model's input, T thresholds; boxes xyxy in pixels.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

THRESHOLDS = 100


def to_pixels(heatmaps_Bhw: Tensor, size: tuple[int, int]) -> Tensor:
    """Interpolate heatmaps bilinearly to the (height, width) of the input: (B, H, W) float32.

    In double precision on the way, so that equal neighbours stay exactly equal.
    """
    fine_B1HW = F.interpolate(heatmaps_Bhw[:, None].double(), size=size, mode="bilinear", align_corners=False)
    return fine_B1HW[:, 0].float()


def inside(boxes_B4: Tensor, size: tuple[int, int]) -> Tensor:
    """Fill boxes: (B, H, W) bool, true for the pixels whose centre is inside."""
    y_H = torch.arange(size[0], device=boxes_B4.device) + 0.5
    x_W = torch.arange(size[1], device=boxes_B4.device) + 0.5
    rows_BH = (y_H >= boxes_B4[:, 1:2]) & (y_H <= boxes_B4[:, 3:4])
    columns_BW = (x_W >= boxes_B4[:, 0:1]) & (x_W <= boxes_B4[:, 2:3])
    return rows_BH[:, :, None] & columns_BW[:, None, :]


def hit_share(heatmaps_Bhw: Tensor, object_BHW: Tensor) -> Tensor:
    """Tell how much of each heatmap's peak lies on its object, (B,) in [0, 1].

    The share is 0 or 1 where one pixel is highest; of equal peaks it is the share of them on the object, what a draw
    among them would hit on average. So a constant map scores as a uniform guess does.

    Args:
        heatmaps_Bhw: of any resolution, each spanning the whole input.
        object_BHW: true on the object; for a box see `inside`.
    """
    fine_BHW = to_pixels(heatmaps_Bhw, _size(object_BHW))
    top_BHW = fine_BHW == fine_BHW.amax((1, 2), keepdim=True)
    return (top_BHW & object_BHW).sum((1, 2)) / top_BHW.sum((1, 2))


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
        "pointing": hit_share(heatmaps_Bhw, inside(boxes_B4, size)),
        "centre": centre_B.float(),
        "chance": areas_B / (height * width),
    }


def energy(heatmaps_Bhw: Tensor, object_BHW: Tensor) -> Tensor:
    """Share of each heatmap's sum that lies on its object (Wang et al. 2020, 1910.01279, section 4.3), (B,) in [0, 1].

    A heatmap of zeros scores as a constant one does, by the object's share of the input.

    Args:
        heatmaps_Bhw: ≥ 0, of any resolution, each spanning the whole input.
        object_BHW: true on the object; for a box see `inside`.
    """
    fine_BHW = to_pixels(heatmaps_Bhw, _size(object_BHW)).double()
    fine_BHW = torch.where((fine_BHW == 0).all(2, keepdim=True).all(1, keepdim=True), 1, fine_BHW)
    return ((fine_BHW * object_BHW).sum((1, 2)) / fine_BHW.sum((1, 2))).float()


def overlap(heatmaps_Bhw: Tensor, object_BHW: Tensor, *, thresholds: int = THRESHOLDS) -> Tensor:
    """Intersection over union of the object and of where the heatmap is ≥ t, for t = 0, 1/T … (T − 1)/T: (B, T).

    After Choe et al. 2020 (2001.07437, section 4): a threshold belongs to a method and not to an image, so take the one
    whose mean over all images is highest. The best of each image would flatter. Deviations from the paper: the mean of
    the IoU instead of the share of images above some IoU; a box is compared with all that is above the threshold, not
    with the box around its largest part.

    Args:
        heatmaps_Bhw: in [0, 1], of any resolution, each spanning the whole input.
        object_BHW: true on the object; for a box see `inside`.
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
