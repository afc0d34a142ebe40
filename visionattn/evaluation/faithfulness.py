"""Does the score follow the heatmap? Deletion and insertion.

Shapes: B images, C channels, H × W pixels, N = H·W, h × w cells of a heatmap, S steps, F images on the way.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture.running import run, undisturbed
from visionattn.errors import DataError, UsageError
from visionattn.evaluation.localisation import to_pixels
from visionattn.maps.method import Target, check_images, culprit, pick, scores_of

STEPS = 16
BLUR = 0.1


@dataclass(frozen=True)
class Curve:
    """What becomes of a probability while images are changed, hottest pixels first.

    Attributes:
        fractions: (S + 1,) of the pixels that are changed, from 0 to 1.
        scores: (B, S + 1), the target's probability.
    """

    fractions: Tensor
    scores: Tensor

    @property
    def auc(self) -> Tensor:
        """(B,) area under the curve, by trapezoids."""
        return torch.trapezoid(self.scores, self.fractions, dim=1)


def deletion(
    model: nn.Module,
    images_BCHW: Tensor,
    heatmaps_Bhw: Tensor,
    *,
    target: Target = None,
    steps: int = STEPS,
    baseline: float | Tensor | None = None,
    batch_size: int = 32,
    seed: int = 0,
) -> Curve:
    """Take an image's pixels away, hottest first (Petsiuk et al. 2018, 1806.07421, algorithm 1): lower is better.

    Deviations from the paper: S equal steps; pixels become their image's mean colour and not zero, which is the mean of
    photographs that were normalised by their data set's mean, but a glaring grey on white paper or in the dark; equal
    pixels come in random order and not by position, so that a constant map scores as a random order does.

        >>> import timm, torch
        >>> from visionattn.maps import GradCAM
        >>> model, images = timm.create_model("test_resnet"), torch.rand(2, 3, 96, 96)
        >>> deletion(model, images, GradCAM()(model, images).heatmaps, steps=4).auc.shape
        torch.Size([2])

    Args:
        model: any vision model; it is left as it was.
        images_BCHW: normalised as the model wants it.
        heatmaps_Bhw: of any resolution, each spanning the whole input.
        target: as a method takes it; what the model says of the whole image by default. Of an index the softmax is
            followed, of a function its value; a function sees any number of images in any order.
        steps: S.
        baseline: what takes the place of pixels, broadcast to the images; their mean colours by default.
        batch_size: images in one forward pass.
        seed: of the order of equal pixels.

    Raises:
        UsageError: the target does not fit the model's output, or there are more steps than pixels.
        DataError: the images or the model's output hold NaN or infinity.
    """
    change = deleting(model, images_BCHW, target=target, baseline=baseline)
    return follow(model, change, heatmaps_Bhw, steps=steps, batch_size=batch_size, seed=seed)


def insertion(
    model: nn.Module,
    images_BCHW: Tensor,
    heatmaps_Bhw: Tensor,
    *,
    target: Target = None,
    steps: int = STEPS,
    blur: float = BLUR,
    batch_size: int = 32,
    seed: int = 0,
) -> Curve:
    """Put an image's pixels back into a blurred copy, hottest first (Petsiuk et al. 2018, 1806.07421, §4.1): higher is
    better.

    Deviations from the paper: S equal steps and equal pixels as in `deletion`; the blur is relative to the image's
    side, so that it fits images of any size (the paper's is σ = 5 of 224 pixels, cut at 11 × 11).

    Args:
        blur: σ of the Gaussian, as a share of the image's shorter side.
        The others, and what is raised, as for `deletion`.
    """
    change = inserting(model, images_BCHW, target=target, blur=blur)
    return follow(model, change, heatmaps_Bhw, steps=steps, batch_size=batch_size, seed=seed)


@dataclass(frozen=True)
class Change:
    """From some images to others, whichever pixels come first: what all heatmaps of the same images share.

    Attributes:
        before: (B, C, H, W).
        after: (B, C, H, W).
        ends: (B, 2) probabilities before and after.
        target: of the whole images: (B,) indices, or a function.
    """

    before: Tensor
    after: Tensor
    ends: Tensor
    target: Target


def deleting(
    model: nn.Module, images_BCHW: Tensor, *, target: Target = None, baseline: float | Tensor | None = None
) -> Change:
    """Prepare `deletion` for any number of heatmaps, to `follow`; arguments as there."""
    check_images(images_BCHW)
    gone = images_BCHW.mean((2, 3), keepdim=True) if baseline is None else torch.as_tensor(baseline).to(images_BCHW)
    score_B, target = probability(model, images_BCHW, target)
    gone_BCHW = gone.expand_as(images_BCHW)
    gone_B, _ = probability(model, gone_BCHW, target)
    return Change(images_BCHW, gone_BCHW, torch.stack([score_B, gone_B], 1), target)


def inserting(model: nn.Module, images_BCHW: Tensor, *, target: Target = None, blur: float = BLUR) -> Change:
    """Prepare `insertion` for any number of heatmaps, to `follow`; arguments as there."""
    check_images(images_BCHW)
    score_B, target = probability(model, images_BCHW, target)
    blurred_BCHW = blurred(images_BCHW, blur)
    blurred_B, _ = probability(model, blurred_BCHW, target)
    return Change(blurred_BCHW, images_BCHW, torch.stack([blurred_B, score_B], 1), target)


@torch.no_grad()
def follow(
    model: nn.Module, change: Change, heatmaps_Bhw: Tensor, *, steps: int = STEPS, batch_size: int = 32, seed: int = 0
) -> Curve:
    """Change the images by the order of their heatmaps' pixels; arguments as for `deletion`."""
    before_BCHW, after_BCHW = change.before, change.after
    count, _, height, width = before_BCHW.shape
    if not 1 <= steps <= height * width:
        raise UsageError(f"steps must be in [1, {height * width}], the pixels of an image, got {steps}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be ≥ 1, got {batch_size}")
    if heatmaps_Bhw.ndim != 3 or len(heatmaps_Bhw) != count:
        raise UsageError(f"heatmaps must be ({count}, h, w), got {tuple(heatmaps_Bhw.shape)}")
    rank_BHW = rank(heatmaps_Bhw.to(before_BCHW.device), (height, width), seed=seed)
    changed_S1 = torch.arange(steps + 1, device=before_BCHW.device) * (height * width) // steps
    image_F = torch.arange(count, device=before_BCHW.device).repeat_interleave(steps - 1)
    changed_F = changed_S1[1:-1].repeat(count)
    scores = [
        probability(
            model,
            torch.where(rank_BHW[b][:, None] < n[:, None, None, None], after_BCHW[b], before_BCHW[b]),
            change.target[b] if isinstance(change.target, Tensor) else change.target,
        )[0]
        for b, n in zip(image_F.split(batch_size), changed_F.split(batch_size), strict=True)
        if len(b)  # a single step has nothing in between
    ]
    between_BS = torch.cat([change.ends.new_empty(0), *scores]).view(count, steps - 1)
    return Curve(changed_S1 / (height * width), torch.cat([change.ends[:, :1], between_BS, change.ends[:, 1:]], 1))


def probability(model: nn.Module, images_BCHW: Tensor, target: Target) -> tuple[Tensor, Target]:
    """The target's probability, (B,) float32, and the target itself, settled: (B,) indices, or the function.

    Raises:
        UsageError: the target does not fit the model's output, or the model has a single output.
        DataError: the output is not finite.
    """
    with undisturbed(model) as bare:
        output = run(bare, images_BCHW)
        score_B, index_B = pick(output, target)
        if index_B is not None:
            logits_BK = scores_of(output).float()
            if logits_BK.shape[1] == 1:
                raise UsageError(
                    "the model has a single output, whose softmax is always 1, so nothing can be scored by it; give "
                    "deletion and insertion target=a function from the output to (B,) scores"
                )
            score_B = logits_BK.softmax(1).gather(1, index_B[:, None])[:, 0]
        if len(score_B) != len(images_BCHW):
            raise UsageError(
                f"the target function returned {len(score_B)} scores for {len(images_BCHW)} images; it sees any number "
                "of them in any order, so it must not know which they are: give indices image by image as a tensor"
            )
        if not score_B.isfinite().all():
            raise DataError(f"the model's output is not finite; {culprit(bare)}")
        return score_B.float(), target if index_B is None else index_B


def rank(heatmaps_Bhw: Tensor, size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Place of every pixel in the order from hottest (0) to coldest, (B, H, W); equal pixels are shuffled."""
    fine_BN = to_pixels(heatmaps_Bhw, size).flatten(1)
    shuffle_BN = torch.rand(fine_BN.shape, generator=torch.Generator().manual_seed(seed)).argsort(1).to(fine_BN.device)
    order_BN = shuffle_BN.gather(1, fine_BN.gather(1, shuffle_BN).argsort(dim=1, descending=True, stable=True))
    place_N = torch.arange(order_BN.shape[1], device=order_BN.device)
    return torch.empty_like(order_BN).scatter_(1, order_BN, place_N.expand_as(order_BN)).unflatten(1, size)


def blurred(images_BCHW: Tensor, blur: float = BLUR) -> Tensor:
    """Blur images by a Gaussian of σ = blur · shorter side, cut at 3 σ; beyond the edges the edge's pixels go on."""
    sigma = blur * min(images_BCHW.shape[2:])
    if not sigma > 0:
        raise UsageError(f"blur must be > 0, got {blur}")
    reach = math.ceil(3 * sigma)
    place = torch.arange(-reach, reach + 1, device=images_BCHW.device, dtype=torch.float32)
    kernel = torch.softmax(-place.square() / (2 * sigma**2), 0).to(images_BCHW.dtype)
    channels = images_BCHW.shape[1]
    padded = F.pad(images_BCHW, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, 1, -1, 1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, 1, 1, -1), groups=channels)
