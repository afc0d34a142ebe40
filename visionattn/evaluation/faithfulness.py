"""Faithfulness: does the model's score depend on the pixels that a heatmap marks? Deletion and insertion.

Shapes: B images, C channels, H × W pixels, N = H·W, h × w cells of a heatmap, S steps, F perturbed images in total.
"""

import html
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture import compact_state, run, undisturbed
from visionattn.errors import DataError, UsageError
from visionattn.evaluation.localisation import to_pixels
from visionattn.maps import Target, check_images, find_non_finite, label_threshold, pick, probabilities_of, scores_of

STEPS = 16
BLUR = 0.1


@dataclass(frozen=True, repr=False)
class Curve:
    """The target's probability while the pixels of an image are changed, hottest first.

    `print(curve)` shows the areas under the curves, and a notebook draws the mean curve.

    Attributes:
        fractions: (S + 1,), the fraction of pixels that are changed, from 0 to 1.
        scores: (B, S + 1), the target's probability at each fraction.
    """

    fractions: Tensor
    scores: Tensor

    @property
    def auc(self) -> Tensor:
        """The area under each image's curve by the trapezoidal rule, (B,)."""
        return torch.trapezoid(self.scores, self.fractions, dim=1)

    def to_dict(self) -> dict[str, object]:
        """Return the curves as plain data for `json.dumps`: `fractions`, `scores` and `auc`."""
        return {"fractions": self.fractions.tolist(), "scores": self.scores.tolist(), "auc": self.auc.tolist()}

    def __repr__(self) -> str:
        areas = self.auc.tolist()
        shown = ", ".join(f"{area:.3f}" for area in areas[:8]) + (", …" if len(areas) > 8 else "")
        mean, steps = sum(areas) / max(1, len(areas)), len(self.fractions) - 1
        images = f"{len(areas)} image{'' if len(areas) == 1 else 's'}"
        return f"Curve(mean area {mean:.3f} over {images}, {steps} steps: {shown})"

    def _repr_html_(self) -> str:
        """Draw the mean curve in a notebook, above its area."""
        mean_S = self.scores.float().mean(0).tolist()
        points = " ".join(
            f"{10 + 280 * x:.1f},{130 - 120 * min(1, max(0, y)):.1f}"
            for x, y in zip(self.fractions.tolist(), mean_S, strict=True)
        )
        return (
            '<svg width="300" height="140" role="img" aria-label="mean curve">'
            '<rect x="10" y="10" width="280" height="120" fill="none" stroke="#999"/>'
            f'<polyline points="{points}" fill="none" stroke="#d60" stroke-width="2"/></svg>'
            f"<pre>{html.escape(repr(self))}</pre>"
        )

    def __getstate__(self) -> dict[str, object]:
        return compact_state(self)


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
    """Follow the target's probability while an image's pixels are removed, hottest first. A lower area is better.

    Petsiuk et al. 2018 (1806.07421, algorithm 1). Deviations from the paper:

    - The pixels are removed in S equal steps.
    - Removed pixels get their image's mean colour instead of zero. Zero is the mean colour of normalised photographs,
      but a conspicuous grey on white paper or in a dark image.
    - Pixels of equal heat are removed in random order instead of by position. So a constant map scores like a random
      order.

        >>> import timm, torch
        >>> from visionattn.maps import GradCAM
        >>> model, images = timm.create_model("test_resnet"), torch.rand(2, 3, 96, 96)
        >>> deletion(model, images, GradCAM()(model, images).heatmaps, steps=4).auc.shape
        torch.Size([2])

    Args:
        model: any vision model; unchanged afterwards.
        images_BCHW: images, normalised for the model.
        heatmaps_Bhw: heatmaps of any resolution, each spanning the whole input.
        target: the output to follow, as a `Method` takes it (default: the prediction for the whole image). For an index
            the curve is the probability of that output (see `probabilities_of`). For a function the curve is the
            function's value; the function must accept the outputs of any number of images in any order.
        steps: S, in [1, H·W].
        baseline: value of removed pixels, broadcast to the images (default: each image's mean colour).
        batch_size: images in one forward pass.
        seed: seed of the order of pixels with equal heat.

    Raises:
        UsageError: the target does not fit the model's output, or there are more steps than pixels.
        DataError: the images or the model's output hold NaN or infinity.
    """
    change = deletion_perturbation(model, images_BCHW, target=target, baseline=baseline)
    return perturbation_curve(model, change, heatmaps_Bhw, steps=steps, batch_size=batch_size, seed=seed)


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
    """Follow the target's probability while a blurred image is restored, hottest pixels first. A higher area is better.

    Petsiuk et al. 2018 (1806.07421, §4.1). Deviations from the paper: the steps and the order of equal pixels are those
    of `deletion`. The blur is relative to the image's side, so that it suits images of any size; the paper blurs images
    of 224 pixels with σ = 5 pixels and a kernel of 11 × 11.

    Args:
        model, images_BCHW, heatmaps_Bhw, target, steps, batch_size, seed: as for `deletion`.
        blur: σ of the Gaussian as a fraction of the image's shorter side, > 0.

    Raises:
        UsageError, DataError: as for `deletion`.
    """
    change = insertion_perturbation(model, images_BCHW, target=target, blur=blur)
    return perturbation_curve(model, change, heatmaps_Bhw, steps=steps, batch_size=batch_size, seed=seed)


@dataclass(frozen=True)
class Perturbation:
    """The first and last images of a deletion or insertion curve, for any number of heatmaps of the same images.

    Attributes:
        before: (B, C, H, W), the images that the curve starts from.
        after: (B, C, H, W), the images that the curve ends with.
        ends: (B, 2), the target's probability before and after.
        target: the output to follow: (B,) indices, or a function.
    """

    before: Tensor
    after: Tensor
    ends: Tensor
    target: Target


def deletion_perturbation(
    model: nn.Module, images_BCHW: Tensor, *, target: Target = None, baseline: float | Tensor | None = None
) -> Perturbation:
    """Prepare `deletion` for `perturbation_curve` with any number of heatmaps. Arguments are as for `deletion`."""
    check_images(images_BCHW)
    gone = images_BCHW.mean((2, 3), keepdim=True) if baseline is None else torch.as_tensor(baseline).to(images_BCHW)
    score_B, target = probability(model, images_BCHW, target)
    gone_BCHW = gone.expand_as(images_BCHW)
    gone_B, _ = probability(model, gone_BCHW, target)
    return Perturbation(images_BCHW, gone_BCHW, torch.stack([score_B, gone_B], 1), target)


def insertion_perturbation(
    model: nn.Module, images_BCHW: Tensor, *, target: Target = None, blur: float = BLUR
) -> Perturbation:
    """Prepare `insertion` for `perturbation_curve` with any number of heatmaps. Arguments are as for `insertion`."""
    check_images(images_BCHW)
    score_B, target = probability(model, images_BCHW, target)
    blurred_BCHW = blurred(images_BCHW, blur)
    blurred_B, _ = probability(model, blurred_BCHW, target)
    return Perturbation(blurred_BCHW, images_BCHW, torch.stack([blurred_B, score_B], 1), target)


@torch.no_grad()
def perturbation_curve(
    model: nn.Module,
    change: Perturbation,
    heatmaps_Bhw: Tensor,
    *,
    steps: int = STEPS,
    batch_size: int = 32,
    seed: int = 0,
) -> Curve:
    """Return the curve of a prepared perturbation that changes the hottest pixels of the heatmaps first.

    Args:
        model, heatmaps_Bhw, steps, batch_size, seed: as for `deletion`.
        change: as `deletion_perturbation` or `insertion_perturbation` returns it.

    Raises:
        UsageError: steps or batch_size is out of range, or the shape of the heatmaps is not (B, h, w).
        DataError: the model's output is not finite.
    """
    before_BCHW, after_BCHW = change.before, change.after
    count, _, height, width = before_BCHW.shape
    if not 1 <= steps <= height * width:
        raise UsageError(f"steps must be in [1, {height * width}], the pixels of an image, got {steps}")
    check_heatmaps(heatmaps_Bhw, count, batch_size)
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
        if len(b)  # with a single step there are no images between the ends
    ]
    between_BS = torch.cat([change.ends.new_empty(0), *scores]).view(count, steps - 1)
    return Curve(changed_S1 / (height * width), torch.cat([change.ends[:, :1], between_BS, change.ends[:, 1:]], 1))


def check_heatmaps(heatmaps_Bhw: Tensor, count: int, batch_size: int) -> None:
    """Raise a UsageError unless there is a heatmap for each of `count` images, and batch_size is at least 1."""
    if batch_size < 1:
        raise UsageError(f"batch_size must be ≥ 1, got {batch_size}")
    if heatmaps_Bhw.ndim != 3 or len(heatmaps_Bhw) != count:
        raise UsageError(f"heatmaps must be ({count}, h, w), got {tuple(heatmaps_Bhw.shape)}")


def probability(model: nn.Module, images_BCHW: Tensor, target: Target) -> tuple[Tensor, Target]:
    """Return the target's probability, (B,) float32, and the target: (B,) indices, or the function as it was passed.

    Raises:
        UsageError: the target does not fit the model's output, or the model has a single output.
        DataError: the output is not finite.
    """
    with undisturbed(model) as bare:
        output = run(bare, images_BCHW)
        score_B, index_B = pick(output, target)
        if index_B is not None:
            logits_BK = scores_of(output).float()
            if logits_BK.shape[1] == 1 and label_threshold(bare) is None:
                raise UsageError(
                    "the model has a single output, whose softmax is always 1; call deletion or insertion with "
                    "target=FUNCTION, a function from the output to (B,) scores"
                )
            score_B = probabilities_of(bare, logits_BK).gather(1, index_B[:, None])[:, 0]
        if len(score_B) != len(images_BCHW):
            raise UsageError(
                f"the target function returned {len(score_B)} scores for {len(images_BCHW)} images, but is called with "
                "any number of images in any order; pass a tensor with one index per image instead"
            )
        if not score_B.isfinite().all():
            raise DataError(f"the model's output is not finite; {find_non_finite(bare)}")
        return score_B.float(), target if index_B is None else index_B


def rank(heatmaps_Bhw: Tensor, size: tuple[int, int], *, seed: int = 0) -> Tensor:
    """Return the rank of every pixel from hottest (0) to coldest, (B, H, W); the order of equal pixels is random."""
    fine_BN = to_pixels(heatmaps_Bhw, size).flatten(1)
    shuffle_BN = torch.rand(fine_BN.shape, generator=torch.Generator().manual_seed(seed)).argsort(1).to(fine_BN.device)
    order_BN = shuffle_BN.gather(1, fine_BN.gather(1, shuffle_BN).argsort(dim=1, descending=True, stable=True))
    place_N = torch.arange(order_BN.shape[1], device=order_BN.device)
    rank_BN = torch.empty_like(order_BN).scatter_(1, order_BN, place_N.expand_as(order_BN))
    return rank_BN.view(len(rank_BN), *size)


def blurred(images_BCHW: Tensor, blur: float = BLUR) -> Tensor:
    """Blur images by a Gaussian of σ = blur · shorter side, cut at 3 σ. The border pixels are repeated as padding."""
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
