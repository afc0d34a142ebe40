"""Class activation maps: the output of a layer, weighted by the gradient of the score.

Shapes: B batch, C channels of the layer, h × w its grid, K outputs.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from visionattn.capture import Activation, StaleSurveyError, Survey, Tokens, in_python, run, survey_images
from visionattn.errors import UsageError, nearest
from visionattn.maps.method import Explanation, Method, Target, fitting, pick, scores_of

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
            score_B, target_B = self.score(output, target)
            assert cut.leaf is not None
            if not score_B.requires_grad:
                raise UsageError(_unreached(activation))
            (gradient,) = torch.autograd.grad(score_B.sum(), cut.leaf, allow_unused=True)
        if gradient is None:
            raise UsageError(_unreached(activation))
        raw_Bhw = reduced_map(activation, self.combine, cut.leaf, gradient)
        return Explanation(raw_Bhw, output, target_B, activation.name)

    def score(self, output: object, target: Target) -> tuple[Tensor, Tensor | None]:
        """Return the scores to explain, (B,), and the classes, (B,); see `pick`."""
        return pick(output, target)

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

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        return _weighted_by_means(values_BCN, gradient_BCN)


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


class HiResCAM(CAM):
    """HiResCAM (Draelos & Carin 2020, 2011.08891): relu(Σ_c g_c A_c), gradient times activation at each position.

    For the same models as `GradCAM`. If only a linear layer follows the explained layer, the map without the relu sums
    to the score, up to the bias; Grad-CAM's averaged gradients can highlight places that the score does not depend on.
    Deviation from the paper: negative values are set to 0, as in the other class activation maps here.
    """

    name = "hirescam"
    needs = "feature maps"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return survey.has_feature_maps

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        return (gradient_BCN * values_BCN).sum(1).relu()


class XGradCAM(CAM):
    """XGrad-CAM (Fu et al. 2020, 2008.02312): relu(Σ_c w_c A_c), w_c = Σ_n g_cn A_cn / Σ_n A_cn.

    For the same models as `GradCAM`. The gradient of a channel is averaged with the channel's activation as weights.
    For activations of both signs (tokens, or features before a ReLU) the sum may be near 0, and then the weight is
    large and unstable. Deviation from the paper: a channel whose activations sum to 0 has the weight 0, where the
    equation is undefined.
    """

    name = "xgradcam"
    needs = "feature maps"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return survey.has_feature_maps

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        total_BC = values_BCN.sum(2)
        product_BC = (gradient_BCN * values_BCN).sum(2)
        weight_BC = torch.where(total_BC == 0, 0, product_BC / torch.where(total_BC == 0, 1, total_BC))
        return (weight_BC[:, :, None] * values_BCN).sum(1).relu()


class FinerCAM(CAM):
    """Finer-CAM (Zhang et al. 2025, 2501.11309): Grad-CAM of the margin between a class and its nearest competitors.

        y_c − γ · mean_t y_t,        t the classes whose scores are closest to y_c

    For the same models as `GradCAM`, if they have at least two scores. The map shows what speaks for the class and not
    for similar classes. The mean over competitors is taken before the relu.

    Args:
        layer: as for `GradCAM`.
        gamma: strength of the comparison, γ ≥ 0; 0 gives Grad-CAM, and the paper uses 0.6.
        competitors: number of classes to compare with, ≥ 1; 3 in the paper. A model with fewer other classes uses all.

    Raises:
        UsageError: gamma or competitors is out of range. When called: the target is a function, or the model has only
            one score.
    """

    name = "finercam"
    needs = "feature maps"
    cost = "a forward and a backward pass"

    def __init__(self, layer: str | None = None, *, gamma: float = 0.6, competitors: int = 3) -> None:
        if not 0 <= gamma < float("inf"):
            raise UsageError(f"gamma must be a finite number of at least 0, got {gamma}")
        if competitors < 1:
            raise UsageError(f"competitors must be at least 1, got {competitors}")
        super().__init__(layer)
        self.gamma, self.competitors = gamma, competitors

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return survey.has_feature_maps

    def score(self, output: object, target: Target) -> tuple[Tensor, Tensor | None]:
        score_B, target_B = pick(output, target)
        if target_B is None:
            raise UsageError("finercam compares classes, so its target must be a class and not a function; use gradcam")
        scores_BK = scores_of(output)
        if scores_BK.shape[1] < 2:
            raise UsageError("finercam compares classes, and this model has only one score; use gradcam")
        distance_BK = (scores_BK - score_B[:, None]).detach().abs()
        distance_BK.scatter_(1, target_B[:, None], torch.inf)
        nearest_BT = distance_BK.topk(min(self.competitors, scores_BK.shape[1] - 1), dim=1, largest=False).indices
        return score_B - self.gamma * scores_BK.gather(1, nearest_BT).mean(1), target_B

    def combine(self, values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
        return _weighted_by_means(values_BCN, gradient_BCN)


def _weighted_by_means(values_BCN: Tensor, gradient_BCN: Tensor) -> Tensor:
    """Return Grad-CAM's map of a layer, (B, N)."""
    return (gradient_BCN.mean(2, keepdim=True) * values_BCN).sum(1).relu()


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


def reduced_map(activation: Activation, make: Callable[..., Tensor], *outputs: Tensor) -> Tensor:
    """Return the map (B, h, w) that `make` computes from `outputs`, after reducing each to the grid, (B, C, N).

    If the model selects tokens depending on the image, each image is handled separately, since the tokens without a
    position differ between images.
    """
    tokens = activation.tokens
    if tokens.index_BWN is not None:
        each = [replace(activation, tokens=tokens.of_image(b)) for b in range(len(tokens.index_BWN))]
        return torch.cat([reduced_map(own, make, *(out[b : b + 1] for out in outputs)) for b, own in enumerate(each)])
    return placed_tokens(activation).to_grid(make(*(values_on_grid(out, activation) for out in outputs))[:, None])


def values_on_grid(value: Tensor, activation: Activation) -> Tensor:
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


def placed_tokens(activation: Activation) -> Tokens:
    return activation.tokens.some(activation.tokens.index_WN[0] >= 0)
