"""Class activation maps: what a layer saw, weighted by how it moved the score.

Shapes: B batch, C channels of the layer, h × w its grid, K outputs.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture.hooks import in_python
from visionattn.capture.running import look, run
from visionattn.capture.survey import Survey
from visionattn.capture.token_layout import Activation, Tokens
from visionattn.errors import UsageError, nearest
from visionattn.maps.fitting import fitting_survey
from visionattn.maps.method import Explanation, Method, Target, pick

if TYPE_CHECKING:
    from typing_extensions import Self


class Cut:
    """Cuts the graph at one module: its output becomes a leaf, and only what follows carries gradients."""

    def __init__(self, model: nn.Module, name: str, *, grad: bool = True) -> None:
        self.module, self.grad = model.get_submodule(name), grad
        self.leaf: Tensor | None = None

    def __enter__(self) -> "Self":
        self._before, self._thread = torch.is_grad_enabled(), threading.get_ident()
        in_python.__enter__()
        self._handle = self.module.register_forward_hook(self._cut)
        return self

    def __exit__(self, *error: Any) -> None:
        self._handle.remove()
        in_python.__exit__()
        torch.set_grad_enabled(self._before)

    def _cut(self, module: nn.Module, args: Any, out: Any) -> Any:
        if threading.get_ident() != self._thread:
            return None
        value = out[0] if isinstance(out, (tuple, list)) else out
        if not self.grad:
            self.leaf = value.detach().clone()  # an in-place activation that follows would spoil it
            return None
        self.leaf = value.detach()
        self.leaf.requires_grad_(True)
        torch.set_grad_enabled(True)
        after = self.leaf.clone()  # so that an in-place activation that follows neither fails nor spoils the leaf
        vars(after).update(vars(value))  # what a model notes on its tensors
        return type(out)((after, *out[1:])) if isinstance(out, (tuple, list)) else after


class CAM(Method):
    """What all class activation maps share: the layer, and the weights over its channels.

    Args:
        layer: name of a module whose output is a feature map or tokens; None for the last one that the score depends on
            at every position.
    """

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        found = look(model, images_BCHW)
        activation = target_layer(model, found, self.layer)
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
        """Make the (B, N) map from the layer's output and the gradient of the score, N tokens or positions."""


class GradCAM(CAM):
    """Grad-CAM (Selvaraju et al. 2017, 1610.02391, eq. 1–2): relu(Σ_c α_c A_c), α_c the mean gradient of channel c.

    For networks whose score depends on the whole of a feature map: convolutional ones, and transformers, whose patch
    tokens take the place of positions. Only the layers after the target compute gradients.
    """

    name = "gradcam"

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        return (gradient_BCN.mean(2, keepdim=True) * values_BCN).sum(1).relu()


class GradCAMPlusPlus(CAM):
    """Grad-CAM++ (Chattopadhay et al. 2018, 1710.11063, eq. 10 and 19): relu(Σ_c w_c A_c), w_c = Σ_n α_cn relu(g_cn).

        α_cn = g_cn² / (2 g_cn² + g_cn³ Σ_m A_cm),        g the gradient of the score

    For the same models as `GradCAM`; several objects of one class are covered more evenly.
    """

    name = "gradcam++"

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        square_BCN = gradient_BCN.square()
        below_BCN = 2 * square_BCN + square_BCN * gradient_BCN * values_BCN.sum(2, keepdim=True)
        tiny = torch.finfo(below_BCN.dtype).tiny
        alpha_BCN = torch.where(below_BCN.abs() > tiny, square_BCN / torch.where(below_BCN == 0, 1, below_BCN), 0)
        weight_BC1 = (alpha_BCN * gradient_BCN.relu()).sum(2, keepdim=True)
        return (weight_BC1 * values_BCN).sum(1).relu()


class LayerCAM(CAM):
    """LayerCAM (Jiang et al. 2021, IEEE TIP 30, eq. 5–6): relu(Σ_c relu(g_c) A_c), weighted position by position.

    For the same models as `GradCAM`; also for early layers, whose maps are fine.
    """

    name = "layercam"

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        return (gradient_BCN.relu() * values_BCN).sum(1).relu()


class EigenCAM(Method):
    """Eigen-CAM (Muhammad & Yeasin 2020, 2008.00299, eq. 3): A v₁, v₁ the first right singular vector of A, (N, C).

    Without gradient or class: what varies most in the layer. For any model with a feature map or tokens.
    Deviation from the paper: the sign of a singular vector is arbitrary, so the map's is chosen for a positive sum.

    Args:
        layer: as for `GradCAM`.
    """

    name = "eigencam"

    def __init__(self, layer: str | None = None) -> None:
        self.layer = layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        activation = target_layer(model, look(model, images_BCHW), self.layer)
        with Cut(model, activation.name, grad=False) as cut:
            output = run(model, images_BCHW)
        assert cut.leaf is not None
        return Explanation(_mapped(activation, self._project, cut.leaf), output, None, activation.name)

    @staticmethod
    def _project(values_BCN: Tensor) -> Tensor:
        values_BNC = values_BCN.mT
        broken_B = ~values_BNC.isfinite().all(2).all(1)
        values_BNC = torch.where(broken_B[:, None, None], 0, values_BNC)
        if values_BNC.shape[1] < values_BNC.shape[2]:  # A v₁ = σ₁ u₁: of A Aᵀ and Aᵀ A, the smaller
            square_B, left_BNN = torch.linalg.eigh(values_BNC @ values_BNC.mT)
            raw_BN = square_B[:, -1:].clamp(min=0).sqrt() * left_BNN[:, :, -1]
        else:
            vector_BC = torch.linalg.eigh(values_BNC.mT @ values_BNC).eigenvectors[:, :, -1]
            raw_BN = (values_BNC @ vector_BC[:, :, None])[:, :, 0]
        raw_BN = raw_BN * torch.where(raw_BN.sum(1, keepdim=True) < 0, -1, 1)
        return torch.where(broken_B[:, None], torch.nan, raw_BN)


class ScoreCAM(Method):
    """Score-CAM (Wang et al. 2020, 1910.01279, algorithm 1): relu(Σ_c α_c A_c), α the softmax over channels of the
    scores.

    The score of channel c is the model's on the image times A_c, enlarged to the image and brought to [0, 1]; no
    gradient. For the same models as `GradCAM`, at the price of one forward pass a channel.

    Args:
        layer: as for `GradCAM`.
        batch_size: masked images in one forward pass.
    """

    name = "scorecam"

    def __init__(self, layer: str | None = None, *, batch_size: int = 32) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self.layer, self.batch_size = layer, batch_size

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        activation = target_layer(model, look(model, images_BCHW), self.layer)
        with Cut(model, activation.name, grad=False) as cut:
            output = run(model, images_BCHW)
        _, target_B = pick(output, target)
        assert cut.leaf is not None
        raw = []
        for b, image_CHW in enumerate(images_BCHW):
            here = replace(activation, tokens=activation.tokens.of_image(b))
            (values_CN,) = _on_grid(cut.leaf[b : b + 1], here)
            target_b = target if target_B is None else target_B[b]
            raw.append(self._explain_one(model, image_CHW, values_CN, _tokens_on_grid(here), target_b))
        return Explanation(torch.stack(raw), output, target_B, activation.name)

    def _explain_one(
        self, model: nn.Module, image_CHW: Tensor, values_CN: Tensor, tokens: Tokens, target: Target
    ) -> Tensor:
        maps_Chw = tokens.to_grid(values_CN[:, None])
        scores = []
        for some_Chw in maps_Chw.split(self.batch_size):
            masks_CHW = F.interpolate(some_Chw[:, None], image_CHW.shape[1:], mode="bilinear")[:, 0]
            low, high = masks_CHW.amin((1, 2), keepdim=True), masks_CHW.amax((1, 2), keepdim=True)
            masks_CHW = torch.where(high > low, (masks_CHW - low) / torch.where(high > low, high - low, 1), 0)
            scores.append(pick(model(image_CHW * masks_CHW[:, None].to(image_CHW.dtype)), target)[0])
        weights_C = torch.softmax(torch.cat(scores).float(), 0)
        return (weights_C[:, None, None] * maps_Chw).sum(0).relu()


def target_layer(model: nn.Module, found: Survey, layer: str | None) -> Activation:
    """Find the layer to explain.

    Without a name: the last output that lies on a grid of more than one cell. Where the last attention has a class
    token, or other queries without a place, what it reads: the output just before it, since behind it only that token's
    output reaches the score.
    """
    grids = [a for a in found.activations if a.tokens.grid != (1, 1) and a.name]
    if layer is not None:
        for activation in reversed(found.activations):
            if activation.name == layer:
                return activation
        names = [name for name, _ in model.named_modules() if name]
        if layer in names:
            known = ", ".join(dict.fromkeys(a.name for a in grids[-3:]))
            raise UsageError(f"the output of {layer!r} does not lie on a grid; layers that do: {known} …")
        raise UsageError(f"the model has no layer {layer!r}.{nearest(layer, names)}")
    places = [(time, site) for time, (_, site) in zip(found.times, found.sites, strict=True) if site is not None]
    if places and places[-1][1].class_query is not None:
        name = places[-1][1].name
        before = [a for a in grids if a.time <= places[-1][0] and not a.name.startswith(f"{name}.")]
        grids = before or grids
    if not grids:
        raise UsageError(
            f"no output of this {type(model).__name__} lies on a grid, so no class activation map fits."
            f"{fitting_survey(found)}"
        )
    return grids[-1]


def _unreached(activation: Activation) -> str:
    return (
        f"no gradient reaches {activation.name}: the score does not depend on it, or the model computes without "
        "gradients after it; choose another layer, or eigencam or scorecam"
    )


def _mapped(activation: Activation, make: Callable[..., Tensor], *outputs: Tensor) -> Tensor:
    """Make a value a token, (B, N), from what the layer has for those on the grid, (B, C, N) each, and put it there.

    Where tokens are picked it is done image by image: in another image, other ones may have no place.
    """
    tokens = activation.tokens
    if tokens.index_BWN is not None:
        each = [replace(activation, tokens=tokens.of_image(b)) for b in range(len(tokens.index_BWN))]
        return torch.cat([_mapped(one, make, *(out[b : b + 1] for out in outputs)) for b, one in enumerate(each)])
    return _tokens_on_grid(activation).to_grid(make(*(_on_grid(out, activation) for out in outputs))[:, None])


def _on_grid(value: Tensor, activation: Activation) -> Tensor:
    """(B, C, N) of the positions that lie on the grid, without class and register tokens."""
    value_BCN = value.detach().float().movedim(activation.channel_axis, 1).flatten(2)
    if activation.tokens.in_order:
        return value_BCN[:, :, activation.tokens.num_prefix_tokens :]
    placed = (activation.tokens.index_WN[0] >= 0).to(value.device)
    return value_BCN if placed.all() else value_BCN[:, :, placed]


def _tokens_on_grid(activation: Activation) -> Tokens:
    return activation.tokens.some(activation.tokens.index_WN[0] >= 0)
