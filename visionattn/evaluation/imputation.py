"""ROAD: the model's score while pixels are removed and filled in from their neighbours (Rong et al. 2022, 2202.00449).

Shapes: B images, C channels, H × W pixels, h × w cells of a heatmap, F fractions.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import UsageError
from visionattn.evaluation.faithfulness import check_heatmaps, probability, rank
from visionattn.maps import Target, check_images

FRACTIONS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 0.9)
NOISE = 0.01
_TOLERANCE = 1e-4  # largest residual, as a fraction of the image's standard deviation
_MAX_ITERATIONS = 500


@torch.no_grad()
def road(
    model: nn.Module,
    images_BCHW: Tensor,
    heatmaps_Bhw: Tensor,
    *,
    target: Target = None,
    fractions: Sequence[float] = FRACTIONS,
    noise: float = NOISE,
    batch_size: int = 32,
    seed: int = 0,
) -> Tensor:
    """Return how much more of the score the hottest pixels hold than the coldest, (B,) in [−1, 1]. Higher is better.

        ROAD = mean over f of  p(without the coldest f · H·W pixels) − p(without the hottest f · H·W pixels)

    Rong et al. 2022 (2202.00449). p is the target's probability, and `impute` fills in the removed pixels. A constant
    map scores about 0. Deviations from the paper: the probability of the target replaces the accuracy, so that each
    image has a value. The result combines both orders of the paper, most and least relevant first. Pixels of equal heat
    are removed in random order.

    Args:
        model: any vision model; unchanged afterwards.
        images_BCHW: images, normalised for the model.
        heatmaps_Bhw: heatmaps of any resolution, each spanning the whole input.
        target: the output to follow, as for `deletion` (default: the prediction for the whole image).
        fractions: of the pixels to remove, each in (0, 1).
        noise: see `impute`.
        batch_size: images in one forward pass.
        seed: seed of the noise and of the order of pixels with equal heat.

    Raises:
        UsageError: a fraction is out of range, or as for `deletion`.
        DataError: the images or the model's output hold NaN or infinity.
    """
    check_images(images_BCHW)
    check_heatmaps(heatmaps_Bhw, len(images_BCHW), batch_size)
    if not fractions or not all(0 < fraction < 1 for fraction in fractions):
        raise UsageError(f"fractions must be in (0, 1), got {list(fractions)}")
    _, target = probability(model, images_BCHW, target)
    count, _, height, width = images_BCHW.shape
    pixels = height * width
    rank_BHW = rank(heatmaps_Bhw.to(images_BCHW.device), (height, width), seed=seed)
    difference_B = images_BCHW.new_zeros(count, dtype=torch.float32)
    for part_B in torch.arange(count, device=images_BCHW.device).split(batch_size):
        target_B = target[part_B] if isinstance(target, Tensor) else target
        for number, fraction in enumerate(fractions):
            removed = min(max(round(fraction * pixels), 1), pixels - 1)
            for sign, gone_BHW in (
                (1, rank_BHW[part_B] >= pixels - removed),
                (-1, rank_BHW[part_B] < removed),
            ):
                filled_BCHW = impute(images_BCHW[part_B], gone_BHW, noise=noise, seed=seed + number)
                difference_B[part_B] += sign * probability(model, filled_BCHW, target_B)[0]
    return difference_B / len(fractions)


@torch.no_grad()
def impute(images_BCHW: Tensor, gone_BHW: Tensor, *, noise: float = NOISE, seed: int = 0) -> Tensor:
    """Fill in removed pixels by noisy linear imputation (Rong et al. 2022, 2202.00449): (B, C, H, W).

        x_i Σ_j w_ij = Σ_j w_ij x_j        w = 1/6 for the four direct neighbours j of i, 1/12 for the diagonal ones

    This holds for every removed pixel i and its neighbours j inside the image, removed or not, so all removed pixels
    are found together. Conjugate gradients with a multigrid cycle solve the equations, up to an error of about 0.1 % of
    the image's standard deviation, a tenth of the noise. Deviation from the paper: the noise is relative to the image's
    standard deviation, since images are normalised in different ways. An image without any known pixel gets its mean
    colour.

    Args:
        images_BCHW: the images.
        gone_BHW: bool, true for pixels to remove.
        noise: standard deviation of the noise on removed pixels ÷ that of the image, ≥ 0.
        seed: seed of the noise.
    """
    flat = images_BCHW.float()
    spread_B111 = flat.std((1, 2, 3), keepdim=True).clamp(min=1e-12)
    gone_B1HW = gone_BHW[:, None].to(flat)
    empty_B111 = gone_BHW.all(2).all(1)[:, None, None, None]
    start_BCHW = torch.where(empty_B111, flat.mean((2, 3), keepdim=True), _first_guess(flat, 1 - gone_B1HW))
    filled_BCHW = _solve(torch.where(gone_B1HW > 0, start_BCHW, flat), gone_B1HW * ~empty_B111, spread_B111)
    generator = torch.Generator().manual_seed(seed)
    noise_BCHW = torch.randn(flat.shape, generator=generator).to(flat.device) * (noise * spread_B111)
    return (filled_BCHW + gone_B1HW * noise_BCHW).to(images_BCHW.dtype)


def _around(x_BCHW: Tensor) -> Tensor:
    """Return Σ_j w_ij x_j over the neighbours inside the image."""
    # the weights are (1, 2, 1) × (1, 2, 1) − 4 at the centre, ÷ 12; a convolution would take five times as long
    rows_BCHW = 2 * x_BCHW
    rows_BCHW[..., 1:] += x_BCHW[..., :-1]
    rows_BCHW[..., :-1] += x_BCHW[..., 1:]
    both_BCHW = rows_BCHW.mul(2).sub_(x_BCHW, alpha=4)
    both_BCHW[..., 1:, :] += rows_BCHW[..., :-1, :]
    both_BCHW[..., :-1, :] += rows_BCHW[..., 1:, :]
    return both_BCHW.div_(12)


def _first_guess(x_BCHW: Tensor, known_B1HW: Tensor) -> Tensor:
    """Return the images with a rough guess of the unknown pixels: means over ever larger blocks of known pixels."""
    if known_B1HW.amin() > 0 or max(x_BCHW.shape[2:]) == 1:
        return x_BCHW
    weight_B1hw = F.avg_pool2d(known_B1HW, 2, ceil_mode=True, count_include_pad=False)
    mean_BChw = F.avg_pool2d(x_BCHW * known_B1HW, 2, ceil_mode=True, count_include_pad=False)
    coarse_BChw = _first_guess(mean_BChw / weight_B1hw.clamp(min=1e-6), (weight_B1hw > 0).to(x_BCHW))
    fine_BCHW = F.interpolate(coarse_BChw, size=x_BCHW.shape[2:], mode="bilinear", align_corners=False)
    return torch.where(known_B1HW > 0, x_BCHW, fine_BCHW)


def _left(v_BCHW: Tensor, gone_B1HW: Tensor) -> Tensor:
    """Return the left sides of the equations, x_i Σ_j w_ij − Σ_j w_ij x_j, for x that is 0 where pixels are known."""
    return gone_B1HW * (_around(torch.ones_like(v_BCHW[:1, :1])) * v_BCHW - _around(v_BCHW))


def _solve(x_BCHW: Tensor, gone_B1HW: Tensor, spread_B111: Tensor) -> Tensor:
    """Solve the equations of `impute` for the removed pixels by conjugate gradients, for all images and channels."""
    levels = [gone_B1HW]
    while min(levels[-1].shape[2:]) > 2:  # a coarse cell is unknown if its four cells are
        levels.append(1 - F.max_pool2d(1 - _even(levels[-1]), 2))
    residual_BCHW = gone_B1HW * _around((1 - gone_B1HW) * x_BCHW) - _left(gone_B1HW * x_BCHW, gone_B1HW)
    better_BCHW = _roughly_solved(residual_BCHW, levels)
    direction_BCHW, product_BC11 = better_BCHW, (residual_BCHW * better_BCHW).sum((2, 3), keepdim=True)
    for _ in range(_MAX_ITERATIONS):
        if not (residual_BCHW.abs().amax((1, 2, 3), keepdim=True) > _TOLERANCE * spread_B111).any():
            break
        moved_BCHW = _left(direction_BCHW, gone_B1HW)
        step_BC11 = _ratio(product_BC11, (direction_BCHW * moved_BCHW).sum((2, 3), keepdim=True))
        x_BCHW = x_BCHW + step_BC11 * direction_BCHW
        residual_BCHW = residual_BCHW - step_BC11 * moved_BCHW
        better_BCHW = _roughly_solved(residual_BCHW, levels)
        before_BC11, product_BC11 = product_BC11, (residual_BCHW * better_BCHW).sum((2, 3), keepdim=True)
        direction_BCHW = better_BCHW + _ratio(product_BC11, before_BC11) * direction_BCHW
    return x_BCHW


def _roughly_solved(right_BCHW: Tensor, levels: list[Tensor]) -> Tensor:
    """Return a rough solution for given right sides: one symmetric multigrid cycle over ever coarser grids."""
    gone_B1HW, *coarser = levels
    x_BCHW = 0.7 * right_BCHW
    if coarser:
        height, width = right_BCHW.shape[2:]
        left = gone_B1HW * (right_BCHW - _left(x_BCHW, gone_B1HW))
        coarse_BChw = _roughly_solved(4 * coarser[0] * F.avg_pool2d(_even(left), 2), coarser)
        fine_BCHW = coarse_BChw.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :, :height, :width]
        x_BCHW = x_BCHW + gone_B1HW * fine_BCHW
    return x_BCHW + 0.7 * (right_BCHW - _left(x_BCHW, gone_B1HW))


def _even(x_BCHW: Tensor) -> Tensor:
    """Return a map with an even number of rows and columns, padded with 0."""
    height, width = x_BCHW.shape[2:]
    return F.pad(x_BCHW, (0, width % 2, 0, height % 2))


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    """Return a ÷ b, and 0 where b is 0: the image has been solved."""
    return torch.where(b > 0, a / b.clamp(min=1e-30), 0)
