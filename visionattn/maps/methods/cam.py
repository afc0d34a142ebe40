"""Class activation maps: the output of a layer, weighted by its effect on the score.

Shapes: B batch, C channels of the layer, h × w its grid, K outputs.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture import Activation, StaleSurveyError, Survey, Tokens, in_python, run, survey_images, undisturbed
from visionattn.errors import UsageError, nearest
from visionattn.maps.method import Explanation, Method, Target, fitting, pick

if TYPE_CHECKING:
    from typing_extensions import Self


class Cut:
    """A context manager that makes a module's output a leaf of the graph, so that only later modules have gradients.

    Attributes:
        leaf: the output of the module's last call; None before the first.

    Args:
        model: the model.
        name: dotted name of the module.
        grad: compute gradients after the module. If False, the output is only kept.
    """

    def __init__(self, model: nn.Module, name: str, *, grad: bool = True) -> None:
        self.module, self.grad = model.get_submodule(name), grad
        self.leaf: Tensor | None = None

    def __enter__(self) -> "Self":
        self._before, self._thread = torch.is_grad_enabled(), threading.get_ident()
        in_python.__enter__()
        self._handle = self.module.register_forward_hook(self._cut)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._handle.remove()
        in_python.__exit__()
        torch.set_grad_enabled(self._before)

    def _cut(self, module: nn.Module, args: object, out: Any) -> Any:  # a user's module may return any type
        if threading.get_ident() != self._thread:
            return None
        value = out[0] if isinstance(out, (tuple, list)) else out
        if not self.grad:
            self.leaf = value.detach().clone()  # a later in-place activation would change it
            return None
        self.leaf = value.detach()
        self.leaf.requires_grad_(True)
        torch.set_grad_enabled(True)
        after = self.leaf.clone()  # a later in-place activation would fail on the leaf, or change it
        vars(after).update(vars(value))  # attributes that a model sets on its tensors
        return type(out)((after, *out[1:])) if isinstance(out, (tuple, list)) else after


class CAM(Method):
    """Base class of the class activation maps that weight a layer's channels by gradients.

    Args:
        layer: name of a module that returns a feature map or tokens (default: the last module where the output at every
            position affects the score; see `target_layer`).
    """

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        activation = target_layer(model, survey_images(model, images_BCHW), self.layer)
        with Cut(model, activation.name) as cut:
            output = run(model, images_BCHW)
        with torch.enable_grad():
            score_B, target_B = pick(output, target)
            assert cut.leaf is not None
            if not score_B.requires_grad:
                raise UsageError(_unreached(activation))
            (gradient,) = torch.autograd.grad(score_B.sum(), cut.leaf, allow_unused=True)
        if gradient is None:
            raise UsageError(_unreached(activation))
        raw_Bhw = _mapped(activation, self.combine, cut.leaf, gradient)
        return Explanation(raw_Bhw, output, target_B, activation.name)

    @abstractmethod
    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        """Return the map (B, N) of a layer's output and of the score's gradient; N is the number of positions."""


class GradCAM(CAM):
    """Grad-CAM (Selvaraju et al. 2017, 1610.02391, eq. 1–2): relu(Σ_c α_c A_c), α_c the mean gradient of channel c.

    For networks in which the score depends on a whole feature map: convolutional networks, and transformers, whose
    patch tokens are the positions of the map. Only the layers after the explained layer compute gradients.
    """

    name = "gradcam"
    needs = "feature maps"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return survey.has_feature_maps

    @classmethod
    def is_default(cls, survey: Survey) -> bool:
        return True  # for models without another default; if Grad-CAM does not fit, its error names methods that fit

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        return (gradient_BCN.mean(2, keepdim=True) * values_BCN).sum(1).relu()


class GradCAMPlusPlus(CAM):
    """Grad-CAM++ (Chattopadhay et al. 2018, 1710.11063, eq. 10 and 19): relu(Σ_c w_c A_c), w_c = Σ_n α_cn relu(g_cn).

        α_cn = g_cn² / (2 g_cn² + g_cn³ Σ_m A_cm),        g the gradient of the score

    For the same models as `GradCAM`. The map covers several objects of one class more evenly.
    """

    name = "gradcam++"
    needs = "feature maps"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return survey.has_feature_maps

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        square_BCN = gradient_BCN.square()
        below_BCN = 2 * square_BCN + square_BCN * gradient_BCN * values_BCN.sum(2, keepdim=True)
        tiny = torch.finfo(below_BCN.dtype).tiny
        alpha_BCN = torch.where(below_BCN.abs() > tiny, square_BCN / torch.where(below_BCN == 0, 1, below_BCN), 0)
        weight_BC1 = (alpha_BCN * gradient_BCN.relu()).sum(2, keepdim=True)
        return (weight_BC1 * values_BCN).sum(1).relu()


class LayerCAM(CAM):
    """LayerCAM (Jiang et al. 2021, IEEE TIP 30, eq. 5–6): relu(Σ_c relu(g_c) A_c), weighted position by position.

    For the same models as `GradCAM`. The method also works for early layers, which have finer grids.
    """

    name = "layercam"
    needs = "feature maps"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return survey.has_feature_maps

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        return (gradient_BCN.relu() * values_BCN).sum(1).relu()


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
        return Explanation(_mapped(activation, self._project, cut.leaf), output, None, activation.name)

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
        (values_CN,) = _on_grid(value, own)
        return _tokens_on_grid(own).to_grid(values_CN[:, None])

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


def target_layer(model: nn.Module, survey: Survey, layer: str | None) -> Activation:
    """Return the layer to explain.

    Args:
        model: the model.
        survey: its survey.
        layer: name of the layer. None chooses the last output on a grid of more than one cell. If the last attention
            layer has a class token, or only queries without a position, the score is computed from these queries.
            Later outputs of the patches do not reach the score, so None then skips the outputs after this layer.

    Raises:
        UsageError: there is no such layer, or its output does not lie on a grid.
    """
    grids = [a for a in survey.activations if a.tokens.grid != (1, 1) and a.name]
    if layer is not None:
        for activation in reversed(survey.activations):
            if activation.name == layer:
                return activation
        names = [name for name, _ in model.named_modules() if name]
        if layer in names:
            known = ", ".join(dict.fromkeys(a.name for a in grids[-3:]))
            raise UsageError(f"the output of {layer!r} does not lie on a grid; choose another layer, e.g. {known}")
        raise UsageError(f"the model has no layer {layer!r}.{nearest(layer, names)}")
    places = [(time, site) for time, (_, site) in zip(survey.times, survey.sites, strict=True) if site is not None]
    if places and places[-1][1].class_query is not None:
        name = places[-1][1].name
        before = [a for a in grids if a.time <= places[-1][0] and not a.name.startswith(f"{name}.")]
        grids = before or grids
    if not grids:
        raise UsageError(
            f"no output of this {type(model).__name__} lies on a grid, so no class activation map fits."
            f"{fitting(survey)}"
        )
    return grids[-1]


def _unreached(activation: Activation) -> str:
    return (
        f"no gradient reaches {activation.name}: the score does not depend on it, or the model computes without "
        "gradients after it; choose another layer, or use eigencam or scorecam"
    )


def _mapped(activation: Activation, make: Callable[..., Tensor], *outputs: Tensor) -> Tensor:
    """Return the map (B, h, w) that `make` computes from `outputs`, after reducing each to the grid, (B, C, N).

    If the model selects tokens depending on the image, each image is handled separately, since the tokens without a
    position differ between images.
    """
    tokens = activation.tokens
    if tokens.index_BWN is not None:
        each = [replace(activation, tokens=tokens.of_image(b)) for b in range(len(tokens.index_BWN))]
        return torch.cat([_mapped(own, make, *(out[b : b + 1] for out in outputs)) for b, own in enumerate(each)])
    return _tokens_on_grid(activation).to_grid(make(*(_on_grid(out, activation) for out in outputs))[:, None])


def _on_grid(value: Tensor, activation: Activation) -> Tensor:
    """Return the values of the positions on the grid, (B, C, N), without class and register tokens."""
    value_BCN = value.detach().float().movedim(activation.channel_axis, 1).flatten(2)
    if value_BCN.shape[2] != (count := activation.tokens.index_WN.shape[1]):
        raise StaleSurveyError(
            f"{activation.name} has {value_BCN.shape[2]} positions, and it had {count} when the model was surveyed"
        )
    if activation.tokens.in_order:
        return value_BCN[:, :, activation.tokens.num_prefix_tokens :]
    placed = (activation.tokens.index_WN[0] >= 0).to(value.device)
    return value_BCN if placed.all() else value_BCN[:, :, placed]


def _tokens_on_grid(activation: Activation) -> Tokens:
    return activation.tokens.some(activation.tokens.index_WN[0] >= 0)
