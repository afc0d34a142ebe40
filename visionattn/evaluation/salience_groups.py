"""SaCo: is a heatmap's heat in proportion to the pixels' influence on the model? (Wu et al. 2024, 2404.01415)

Shapes: B images, C channels, H × W pixels, N = H·W, h × w cells of a heatmap, K groups.
"""

import torch
from torch import Tensor, nn

from visionattn.errors import UsageError
from visionattn.evaluation.faithfulness import check_heatmaps, probability, rank
from visionattn.evaluation.localisation import to_pixels
from visionattn.maps import Target, check_images

GROUPS = 10


@torch.no_grad()
def saco(
    model: nn.Module,
    images_BCHW: Tensor,
    heatmaps_Bhw: Tensor,
    *,
    target: Target = None,
    groups: int = GROUPS,
    batch_size: int = 32,
    seed: int = 0,
) -> Tensor:
    """Return the salience-guided faithfulness coefficient of each heatmap, (B,) in [−1, 1]. Higher is better.

        F = Σ_{i<j} ± (s_i − s_j) / Σ_{i<j} (s_i − s_j)        + where Δ_i ≥ Δ_j, − elsewhere

    Wu et al. 2024 (2404.01415, algorithm 1). The pixels are divided into K groups of equal size, from hottest to
    coldest. s_i is the mean heat of group i. Δ_i is how much the target's probability falls when this group alone gets
    the image's mean colour. So F is 1 if every hotter group has at least the influence of each colder group. Multiples
    of a heatmap, and a heatmap plus a constant, have the same F; a constant heatmap has F = 0. Deviation from the
    paper: pixels of equal heat are ordered randomly, which decides in which of two neighbouring groups they are.

    Args:
        model: any vision model; unchanged afterwards.
        images_BCHW: images, normalised for the model.
        heatmaps_Bhw: heatmaps of any resolution, each spanning the whole input.
        target: the output to follow, as for `deletion` (default: the prediction for the whole image).
        groups: K, in [2, H·W].
        batch_size: images in one forward pass.
        seed: seed of the order of pixels with equal heat.

    Raises:
        UsageError: there are fewer than two groups or more than pixels, or as for `deletion`.
        DataError: the images or the model's output hold NaN or infinity.
    """
    check_images(images_BCHW)
    check_heatmaps(heatmaps_Bhw, len(images_BCHW), batch_size)
    count, _, height, width = images_BCHW.shape
    if not 2 <= groups <= height * width:
        raise UsageError(f"groups must be in [2, {height * width}], got {groups}")
    score_B, target = probability(model, images_BCHW, target)
    heatmaps_Bhw = heatmaps_Bhw.to(images_BCHW.device)
    group_BHW = rank(heatmaps_Bhw, (height, width), seed=seed) * groups // (height * width)
    group_BN = group_BHW.flatten(1)
    heat_BN = to_pixels(heatmaps_Bhw, (height, width)).flatten(1).double()
    sizes_BK = heat_BN.new_zeros(count, groups).scatter_add_(1, group_BN, torch.ones_like(heat_BN))
    salience_BK = heat_BN.new_zeros(count, groups).scatter_add_(1, group_BN, heat_BN) / sizes_BK
    mean_BC11 = images_BCHW.mean((2, 3), keepdim=True)
    image_F = torch.arange(count, device=images_BCHW.device).repeat_interleave(groups)
    group_F = torch.arange(groups, device=images_BCHW.device).repeat(count)
    without_F = [
        probability(
            model,
            torch.where((group_BHW[b] == k[:, None, None])[:, None], mean_BC11[b], images_BCHW[b]),
            target[b] if isinstance(target, Tensor) else target,
        )[0]
        for b, k in zip(image_F.split(batch_size), group_F.split(batch_size), strict=True)
    ]
    return agreement(salience_BK, score_B[:, None] - torch.cat(without_F).view(count, groups))


def agreement(salience_BK: Tensor, influence_BK: Tensor) -> Tensor:
    """Return F of the groups' salience and influence, (B,) float32; the groups are sorted from hottest to coldest."""
    # the sum over pairs i < j: the pair's weight counts for or against, as its influences are ordered
    weight_BKK = (salience_BK[:, :, None] - salience_BK[:, None, :]).clamp(min=0).triu(1)
    sign_BKK = torch.where(influence_BK[:, :, None] >= influence_BK[:, None, :], 1.0, -1.0).double()
    total_B = weight_BKK.sum((1, 2))
    return ((sign_BKK * weight_BKK).sum((1, 2)) / torch.where(total_B == 0, 1, total_B)).float()
