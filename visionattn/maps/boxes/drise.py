"""D-RISE: the score of a box under random masks.

Shapes: N boxes of an image, M masks, H × W the input, h × w a map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_iou

from visionattn.errors import UsageError
from visionattn.maps.boxes.box_method import BoxMethod, best_boxes, detect

_FINE = 4  # cells of a map in one cell of a mask, along each axis


class DRISE(BoxMethod):
    """D-RISE, the mean of random masks, weighted by how well the box is found under each mask (Petsiuk et al. 2021,
    2006.03204, §3).

        map = Σ_m w_m M_m / Σ_m M_m        w_m = max_j IoU(box, box_j) · [label_j = label] · score_j

    The maximum is over the boxes j that the detector finds in the masked image; w is 0 without such boxes. A mask is a
    random grid of 0 and 1, enlarged bilinearly to the image and shifted by a random part of a cell. Masked pixels fade
    to 0, the mean colour if the preprocessing subtracts it. The method needs neither layers nor gradients, so it fits
    every detector; it costs one forward pass for each mask, for all boxes together.

    Deviations from the paper: the class similarity is 1 for equal labels and 0 otherwise, since a detector returns one
    label for each box; the sum is divided by the sum of the masks, as in RISE (1806.07421, eq. 6), so that the borders
    of the image, which fewer masks show, are not darker.

    Args:
        masks: M, the number of masks (default: 500).
        grid: cells of a mask along each axis (default: 16).
        probability: probability that a cell is shown, in (0, 1) (default: 0.5).
        batch_size: masked images in one forward pass (default: 16).
        seed: seed of the masks.

    Raises:
        UsageError: masks, grid or batch_size is < 1, or probability is not in (0, 1).
    """

    name = "drise"

    def __init__(
        self, masks: int = 500, *, grid: int = 16, probability: float = 0.5, batch_size: int = 16, seed: int = 0
    ) -> None:
        if min(masks, grid, batch_size) < 1 or not 0 < probability < 1:
            raise UsageError(
                "masks, grid and batch_size must be ≥ 1 and probability in (0, 1), got "
                f"{masks}, {grid}, {batch_size} and {probability}"
            )
        self.masks, self.grid, self.probability = masks, grid, probability
        self.batch_size, self.seed = batch_size, seed

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        with torch.no_grad():
            detections = [best_boxes(found, max_boxes, min_score) for found in detect(model, images_BCHW)]
            size = images_BCHW.shape[2], images_BCHW.shape[3]
            fine = min(size[0], _FINE * self.grid), min(size[1], _FINE * self.grid)
            generator = torch.Generator().manual_seed(self.seed)
            weighted = [images_BCHW.new_zeros(len(found["boxes"]), *fine, dtype=torch.float32) for found in detections]
            total_hw = images_BCHW.new_zeros(fine, dtype=torch.float32)
            for start in range(0, self.masks, self.batch_size):
                count = min(self.batch_size, self.masks - start)
                masks_MHW = self._draw(count, size, generator).to(images_BCHW.device)
                fine_Mhw = F.adaptive_avg_pool2d(masks_MHW, fine)
                total_hw += fine_Mhw.sum(0)
                for image_CHW, found, sums_Nhw in zip(images_BCHW, detections, weighted, strict=True):
                    if len(sums_Nhw):
                        masked_MCHW = image_CHW * masks_MHW[:, None].to(image_CHW.dtype)
                        weights_MN = torch.stack([_similarity(found, other) for other in detect(model, masked_MCHW)])
                        sums_Nhw += torch.einsum("mn,mhw->nhw", weights_MN, fine_Mhw)
        raws = [sums_Nhw / total_hw.clamp(min=1e-6) for sums_Nhw in weighted]
        return detections, raws, f"score under {self.masks} masks"

    def _draw(self, count: int, size: tuple[int, int], generator: torch.Generator) -> Tensor:
        """Draw masks, (count, H, W) in [0, 1]."""
        shown_Mgg = (torch.rand(count, 1, self.grid + 1, self.grid + 1, generator=generator) < self.probability).float()
        cell = [-(-extent // self.grid) for extent in size]
        large = [(self.grid + 1) * extent for extent in cell]
        large_MHW = F.interpolate(shown_Mgg, large, mode="bilinear", align_corners=False)[:, 0]
        shifts_M2 = torch.stack([torch.randint(extent, (count,), generator=generator) for extent in cell], 1)
        cut = [
            mask_HW[y : y + size[0], x : x + size[1]]
            for mask_HW, (y, x) in zip(large_MHW, shifts_M2.tolist(), strict=True)
        ]
        return torch.stack(cut)


def _similarity(found: dict[str, Tensor], other: dict[str, Tensor]) -> Tensor:
    """Return how well each box is found among other detections, (N,) in [0, 1]."""
    if not len(other["boxes"]):
        return torch.zeros_like(found["scores"], dtype=torch.float32)
    same_NP = found["labels"][:, None] == other["labels"]
    overlap_NP = box_iou(found["boxes"].float(), other["boxes"].float())
    return (overlap_NP * same_NP * other["scores"].float()).amax(1)
