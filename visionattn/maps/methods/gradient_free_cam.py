"""Class activation maps without gradients: the main component of a layer, and channels weighted by the score they keep.

Shapes: B batch, C channels of the layer, h × w its grid, K outputs.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture import Activation, Survey, run, survey_images, undisturbed
from visionattn.errors import UsageError
from visionattn.maps.method import Explanation, Method, Target, pick
from visionattn.maps.methods.cam import Cut, placed_tokens, reduced_map, target_layer, values_on_grid


class EigenCAM(Method):
    """Eigen-CAM (Muhammad & Yeasin 2020, 2008.00299, eq. 3): A v₁, v₁ the first right singular vector of A, (N, C).

    The map shows the largest variation in the layer, without a gradient or a class. For any model with a feature map or
    tokens. Deviation from the paper: the sign of a singular vector is arbitrary, so the sign is chosen such that the
    sum of the map is positive.

    Args:
        layer: as for `GradCAM`.
    """

    name = "eigencam"
    needs = "feature maps"
    cost = "a forward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return survey.has_feature_maps

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        activation = target_layer(model, survey_images(model, images_BCHW), self.layer)
        with Cut(model, activation.name, grad=False) as cut:
            output = run(model, images_BCHW)
        assert cut.leaf is not None
        return Explanation(reduced_map(activation, self._project, cut.leaf), output, None, activation.name)

    @staticmethod
    def _project(values_BCN: Tensor) -> Tensor:
        values_BNC = values_BCN.mT
        broken_B = ~values_BNC.isfinite().all(2).all(1)
        values_BNC = torch.where(broken_B[:, None, None], 0, values_BNC)
        if values_BNC.shape[1] < values_BNC.shape[2]:  # A v₁ = σ₁ u₁, so take the smaller of A Aᵀ and Aᵀ A
            square_B, left_BNN = torch.linalg.eigh(values_BNC @ values_BNC.mT)
            raw_BN = square_B[:, -1:].clamp(min=0).sqrt() * left_BNN[:, :, -1]
        else:
            vector_BC = torch.linalg.eigh(values_BNC.mT @ values_BNC).eigenvectors[:, :, -1]
            raw_BN = (values_BNC @ vector_BC[:, :, None])[:, :, 0]
        raw_BN = raw_BN * torch.where(raw_BN.sum(1, keepdim=True) < 0, -1, 1)
        return torch.where(broken_B[:, None], torch.nan, raw_BN)


class ScoreCAM(Method):
    """Score-CAM (Wang et al. 2020, 1910.01279, algorithm 1): relu(Σ_c α_c A_c), α the softmax of the channels' scores.

    The image is masked by each channel: multiplied by A_c, enlarged to the image and scaled to [0, 1]. The model's
    score of the masked image is the score of channel c. The method needs no gradient, but one forward pass a channel.
    For the same models as `GradCAM`.

    Args:
        layer: as for `GradCAM`.
        batch_size: masked images in one forward pass, ≥ 1.

    Raises:
        UsageError: batch_size is below 1.
    """

    name = "scorecam"
    needs = "feature maps"
    cost = "a forward pass a channel"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return survey.has_feature_maps

    def __init__(self, layer: str | None = None, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self.layer, self.batch_size = layer, batch_size

    def passes(self, model: nn.Module, images_BCHW: Tensor) -> int:
        """Return the number of channels of the layer, plus 1; see `Method.passes`.

        Raises:
            UsageError: there is no such layer, or no layer fits.
        """
        with torch.no_grad(), undisturbed(model) as bare:
            activation = target_layer(bare, survey_images(bare, images_BCHW[:1]), self.layer)
            with Cut(bare, activation.name, grad=False) as cut:
                run(bare, images_BCHW[:1])
        assert cut.leaf is not None
        return 1 + cut.leaf.shape[activation.channel_axis]

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        activation = target_layer(model, survey_images(model, images_BCHW), self.layer)
        with Cut(model, activation.name, grad=False) as cut:
            output = run(model, images_BCHW)
        _, target_B = pick(output, target)
        assert cut.leaf is not None
        maps_BChw = torch.stack([self._maps(cut.leaf[b : b + 1], activation, b) for b in range(len(images_BCHW))])
        if callable(target):
            scores_BC = self._scores_of_batch(model, images_BCHW, maps_BChw, target)
        else:
            assert target_B is not None
            each = zip(images_BCHW, maps_BChw, target_B, strict=True)
            scores_BC = torch.stack([self._scores(model, *image) for image in each])
        weights_BC = torch.softmax(scores_BC.float(), 1)
        raw_Bhw = (weights_BC[:, :, None, None] * maps_BChw).sum(1).relu()
        return Explanation(raw_Bhw, output, target_B, activation.name)

    @staticmethod
    def _maps(value: Tensor, activation: Activation, number: int) -> Tensor:
        """Return the channels of one image on the grid, (C, h, w)."""
        own = replace(activation, tokens=activation.tokens.of_image(number))
        (values_CN,) = values_on_grid(value, own)
        return placed_tokens(own).to_grid(values_CN[:, None])

    def _scores(self, model: nn.Module, image_CHW: Tensor, maps_Chw: Tensor, target: Tensor) -> Tensor:
        """Return the scores of one image under each channel's mask, (C,)."""
        parts = maps_Chw.split(self.batch_size)
        return torch.cat([pick(model(image_CHW * _masks(part_Chw, image_CHW)), target)[0] for part_Chw in parts])

    @staticmethod
    def _scores_of_batch(
        model: nn.Module, images_BCHW: Tensor, maps_BChw: Tensor, target: Callable[[Any], Tensor]
    ) -> Tensor:
        """Return the scores (B, C) by a target function, which gets whole batches: it may index images in a batch."""
        masked = (images_BCHW * _masks(maps_Bhw, images_BCHW) for maps_Bhw in maps_BChw.unbind(1))
        return torch.stack([pick(model(batch_BCHW), target)[0] for batch_BCHW in masked], 1)


def _masks(maps_Nhw: Tensor, image: Tensor) -> Tensor:
    """Return maps enlarged to the image and scaled to [0, 1], (N, 1, H, W); constant maps become 0."""
    masks_NHW = F.interpolate(maps_Nhw[:, None], image.shape[-2:], mode="bilinear")[:, 0]
    low, high = masks_NHW.amin((1, 2), keepdim=True), masks_NHW.amax((1, 2), keepdim=True)
    masks_NHW = torch.where(high > low, (masks_NHW - low) / torch.where(high > low, high - low, 1), 0)
    return masks_NHW[:, None].to(image.dtype)
