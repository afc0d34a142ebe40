"""Methods that need no layer of the model: integrated gradients, SmoothGrad, occlusion and RISE.

They fit any model with scores. They run it many times for an image, so they are no defaults. Their maps lie on cells of
pixels.

Shapes: B images, C channels, H rows, W columns, N masks, s cells along a side.
"""

from collections.abc import Callable, Iterator
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture import run
from visionattn.errors import UsageError
from visionattn.maps.method import Explanation, Method, Target, pick, probabilities_of, scores_of

_SOURCE = "the image"


def _captum(method: str) -> ModuleType:
    """Return captum.attr.

    Raises:
        UsageError: captum is not installed.
    """
    try:
        import captum.attr
    except ImportError as error:
        raise UsageError(f"{method} needs captum: run: python -m pip install 'visionattn[baselines]'") from error
    return captum.attr


def _scored(method: str, model: nn.Module, target: Target) -> Callable[..., Tensor]:
    """Return a function from images, and the classes of these images or None, to their scores, (B,)."""

    def score(images_BCHW: Tensor, target_B: Tensor | None = None) -> Tensor:
        score_B, _ = pick(model(images_BCHW), target if target_B is None else target_B)
        if torch.is_grad_enabled() and not score_B.requires_grad:
            raise UsageError(
                f"{method} needs the gradient of the score with respect to the image, and this {type(model).__name__} "
                "computes without gradients; use occlusion or rise"
            )
        return score_B

    return score


def _check_positive(**numbers: float) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise UsageError(f"{name} must be at least 1, got {number}")


def _in_cells(map_BHW: Tensor, side: int) -> Tensor:
    """Return the means over cells of about `side` × `side` pixels, (B, h, w)."""
    height, width = (-(-pixels // side) for pixels in map_BHW.shape[1:])  # rounded up
    return F.adaptive_avg_pool2d(map_BHW[:, None], (height, width))[:, 0]


class IntegratedGradients(Method):
    """Integrated gradients (Sundararajan et al. 2017, 1703.01365, eq. 1), computed by captum.

        IG = (x − x′) ⊙ ∫₀¹ ∂y(x′ + α (x − x′))/∂x dα        x the image, x′ the baseline, y the score

    IG sums to y(x) − y(x′). The map is relu(Σ_c IG_c): the sum over colours, averaged over cells of pixels, where it
    speaks for the score. For any model with gradients. The baseline is 0, which is the mean colour for images that are
    normalised with a mean.

    Args:
        steps: points of the Gauss–Legendre quadrature, ≥ 1.
        cell: side of a cell in pixels, ≥ 1. Single pixels vary so much that an overlay of them shows only a few.
        batch_size: images in one forward pass, ≥ 1.

    Raises:
        UsageError: an argument is out of range. When called: captum is not installed, or the model computes without
            gradients.
    """

    name = "integrated_gradients"
    needs = "any model"
    cost = "many forward and backward passes"

    def __init__(self, *, steps: int = 32, cell: int = 8, batch_size: int = 32) -> None:
        _check_positive(steps=steps, cell=cell, batch_size=batch_size)
        self.steps, self.cell, self.batch_size = steps, cell, batch_size

    def passes(self, model: nn.Module, images_BCHW: Tensor) -> int:
        """See `Method.passes`."""
        return 1 + 3 * self.steps

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        integrated_gradients = _captum(self.name).IntegratedGradients(_scored(self.name, model, target))
        output = run(model, images_BCHW)
        _, target_B = pick(output, target)
        count = len(images_BCHW)
        with torch.enable_grad():
            found_BCHW = integrated_gradients.attribute(
                images_BCHW.clone().requires_grad_(),
                additional_forward_args=target_B,
                n_steps=self.steps,
                # a target function gets the outputs of exactly B images, in order
                internal_batch_size=count if target_B is None else max(count, self.batch_size),
            )
        raw_Bhw = _in_cells(found_BCHW.detach().sum(1), self.cell).relu()
        return Explanation(raw_Bhw, output, target_B, _SOURCE)


class SmoothGrad(Method):
    """SmoothGrad (Smilkov et al. 2017, 1706.03825): the gradient of the score, averaged over noisy copies of the image.

        M = 1/n Σ_i ∂y(x + ε_i)/∂x,        ε_i ~ N(0, σ²),  σ = noise · (max x − min x)

    The map is max_c |M_c|, the largest over colours, averaged over cells of pixels. For any model with gradients. All
    images get the same noise, so an image's map does not depend on its batch.

    Args:
        samples: n, ≥ 1; 50 in the paper.
        noise: standard deviation of the noise, as a fraction of the range of the image's values; 0.1 to 0.2 in the
            paper.
        cell: side of a cell in pixels, ≥ 1; see `IntegratedGradients`.
        seed: seed of the noise.

    Raises:
        UsageError: an argument is out of range. When called: the model computes without gradients.
    """

    name = "smoothgrad"
    needs = "any model"
    cost = "many forward and backward passes"

    def __init__(self, *, samples: int = 32, noise: float = 0.15, cell: int = 8, seed: int = 0) -> None:
        _check_positive(samples=samples, cell=cell)
        if not 0 <= noise < float("inf"):
            raise UsageError(f"noise must be a finite number of at least 0, got {noise}")
        self.samples, self.noise, self.cell, self.seed = samples, noise, cell, seed

    def passes(self, model: nn.Module, images_BCHW: Tensor) -> int:
        """See `Method.passes`."""
        return 1 + 3 * self.samples

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        output = run(model, images_BCHW)
        _, target_B = pick(output, target)
        score = _scored(self.name, model, target)
        low_B111, high_B111 = (bound((1, 2, 3), keepdim=True) for bound in (images_BCHW.amin, images_BCHW.amax))
        generator = torch.Generator().manual_seed(self.seed)
        total_BCHW = torch.zeros_like(images_BCHW)
        for _ in range(self.samples):
            noise_CHW = torch.randn(images_BCHW.shape[1:], generator=generator).to(images_BCHW)
            noisy_BCHW = images_BCHW + self.noise * (high_B111 - low_B111) * noise_CHW
            with torch.enable_grad():
                score_B = score(noisy_BCHW.requires_grad_(), target_B)
                total_BCHW += torch.autograd.grad(score_B.sum(), noisy_BCHW)[0]
        raw_Bhw = _in_cells(total_BCHW.abs().amax(1) / self.samples, self.cell)
        return Explanation(raw_Bhw, output, target_B, _SOURCE)


class Occlusion(Method):
    """Occlusion (Zeiler & Fergus 2013, 1311.2901, §4.2): how much the score falls if a square is hidden; by captum.

    A square slides over the image and is filled with 0, which is the mean colour for images that are normalised with a
    mean. A pixel's value is the mean fall over the squares that hide it. The map is relu of its means over cells of
    `stride` pixels. For any model. Deviation from the paper: the score is the output itself, and not its probability.

    Args:
        size: side of the square in pixels, ≥ 1 (default: a seventh of the image's shorter side).
        stride: distance between squares in pixels, ≥ 1 and at most `size` (default: half of `size`).
        batch_size: images in one forward pass, ≥ 1.

    Raises:
        UsageError: an argument is out of range. When called: captum is not installed, or the square is larger than the
            image.
    """

    name = "occlusion"
    needs = "any model"
    cost = "a forward pass a mask"

    def __init__(self, *, size: int | None = None, stride: int | None = None, batch_size: int = 32) -> None:
        _check_positive(size=1 if size is None else size, batch_size=batch_size)
        if stride is not None and not (stride >= 1 and (size is None or stride <= size)):
            raise UsageError(f"stride must be at least 1 and at most size, got {stride} and size {size}")
        self.size, self.stride, self.batch_size = size, stride, batch_size

    def _square(self, images_BCHW: Tensor) -> tuple[int, int]:
        """Return the size and stride of the square for these images."""
        shorter = min(images_BCHW.shape[2:])
        size = self.size or max(1, round(shorter / 7))
        if size > shorter:
            raise UsageError(
                f"occlusion hides squares of {size} pixels, and the shorter side of the image has {shorter}"
            )
        return size, min(size, self.stride or max(1, size // 2))

    def passes(self, model: nn.Module, images_BCHW: Tensor) -> int:
        """Return the number of squares, plus 2; see `Method.passes`."""
        size, stride = self._square(images_BCHW)
        down, across = (1 - (size - side) // stride for side in images_BCHW.shape[2:])
        return 2 + down * across

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        occlusion = _captum(self.name).Occlusion(_scored(self.name, model, target))
        size, stride = self._square(images_BCHW)
        output = run(model, images_BCHW)
        _, target_B = pick(output, target)
        count, channels = images_BCHW.shape[:2]
        found_BCHW = occlusion.attribute(
            images_BCHW,
            sliding_window_shapes=(channels, size, size),
            strides=(channels, stride, stride),
            additional_forward_args=target_B,
            # a target function gets the outputs of exactly B images, in order
            perturbations_per_eval=1 if target_B is None else max(1, self.batch_size // count),
        )
        return Explanation(_in_cells(found_BCHW[:, 0], stride).relu(), output, target_B, _SOURCE)


class RISE(Method):
    """RISE (Petsiuk et al. 2018, 1806.07421, eq. 6): the mean of random masks, weighted by the score that each keeps.

        S = 1/(N p) Σ_i f(x ⊙ M_i) M_i        f the probability of the class, or the value of a target function

    A mask is s × s random cells, 1 with probability p, enlarged bilinearly and moved by up to one cell. Hidden pixels
    are 0, which is the mean colour for images that are normalised with a mean. The map is averaged over cells of a
    quarter of the masks' cells, which are smooth. For any model. All images get the same masks.

    Args:
        masks: N, ≥ 1; 4,000 to 8,000 in the paper. Fewer masks leave more noise.
        cells: s, ≥ 1; 7 in the paper.
        keep: p in (0, 1); 0.5 in the paper.
        batch_size: masked images in one forward pass, ≥ 1.
        seed: seed of the masks.

    Raises:
        UsageError: an argument is out of range.
    """

    name = "rise"
    needs = "any model"
    cost = "a forward pass a mask"

    def __init__(
        self, *, masks: int = 1000, cells: int = 7, keep: float = 0.5, batch_size: int = 32, seed: int = 0
    ) -> None:
        _check_positive(masks=masks, cells=cells, batch_size=batch_size)
        if not 0 < keep < 1:
            raise UsageError(f"keep must be between 0 and 1, got {keep}")
        self.masks, self.cells, self.keep, self.batch_size, self.seed = masks, cells, keep, batch_size, seed

    def passes(self, model: nn.Module, images_BCHW: Tensor) -> int:
        """See `Method.passes`."""
        return 1 + self.masks

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        output = run(model, images_BCHW)
        _, target_B = pick(output, target)
        count, (height, width) = len(images_BCHW), images_BCHW.shape[2:]
        # a target function gets the outputs of exactly B images, in order
        together = 1 if target_B is None else max(1, self.batch_size // count)
        total_BHW = torch.zeros(count, height, width, device=images_BCHW.device)
        for part_NHW in self._draw(height, width, together):
            part_NHW = part_NHW.to(images_BCHW)
            after = model((images_BCHW[:, None] * part_NHW[:, None]).flatten(0, 1))
            if target_B is None:
                score_M, _ = pick(after, target)
            else:
                index_M = target_B.repeat_interleave(len(part_NHW))
                score_M = probabilities_of(model, scores_of(after).float()).gather(1, index_M[:, None])
            total_BHW += torch.einsum("bn,nhw->bhw", score_M.float().reshape(count, -1), part_NHW.float())
        side = max(1, min(height, width) // (4 * self.cells))
        return Explanation(_in_cells(total_BHW / (self.masks * self.keep), side), output, target_B, _SOURCE)

    def _draw(self, height: int, width: int, count: int) -> Iterator[Tensor]:
        """Yield the masks, `count` at a time: (N, H, W) in [0, 1]."""
        generator = torch.Generator().manual_seed(self.seed)
        cell = [-(-side // self.cells) for side in (height, width)]  # rounded up
        for start in range(0, self.masks, count):
            masks = []
            for _ in range(min(count, self.masks - start)):
                grid_ss = torch.rand(self.cells, self.cells, generator=generator) < self.keep
                size = [(self.cells + 1) * side for side in cell]
                large = F.interpolate(grid_ss[None, None].float(), size=size, mode="bilinear")[0, 0]
                top, left = (int(torch.randint(side, (), generator=generator)) for side in cell)
                masks.append(large[top : top + height, left : left + width])
            yield torch.stack(masks)
