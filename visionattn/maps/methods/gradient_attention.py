"""Attention weighted by its gradient, which is computed from the gradient of the attention's output.

Shapes: B images, W windows, H heads, Q queries, K keys, D channels of a head, h × w grid. A is the attention and dA the
gradient of the score with respect to A.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from visionattn.capture import Call, Interception, Site, Survey, place, products, run
from visionattn.errors import UsageError
from visionattn.maps.method import Explanation, Method, Target, pick, require_attention


class Tape(Interception):
    """Records the calls of attention from layer `first` on. The autograd graph starts at the output of this layer.

    Attributes:
        calls: each call and its output, in order.
    """

    def __init__(self, model: nn.Module, first: int) -> None:
        super().__init__(model)
        self.first = first
        self.calls: list[tuple[Call, Tensor]] = []
        self._before = False

    def wants(self, site: Site) -> bool:
        return self.turn >= self.first

    def attended(self, call: Call, out: Tensor, kept: Tensor | None) -> Tensor | None:
        if not self.calls:
            self._before = torch.is_grad_enabled()
            torch.set_grad_enabled(True)  # only from this layer on: earlier layers need no graph
        if not out.requires_grad:  # also in branches that do not depend on the first layer
            out = out.detach().requires_grad_(True)
            self.calls.append((call, out))
            return out.clone()  # an in-place operation on the leaf itself would fail
        self.calls.append((call, out))
        return None

    def end(self) -> None:
        super().end()
        torch.set_grad_enabled(self._before)

    def gradients(self, score_B: Tensor) -> list[Tensor]:
        """Return the gradient of each image's score with respect to each recorded output.

        Raises:
            UsageError: the score does not depend on any recorded output.
        """
        return gradients_of(score_B, [out for _, out in self.calls])


def gradients_of(score_B: Tensor, outputs: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of each image's score with respect to outputs of attention.

    Raises:
        UsageError: the score does not depend on any of them.
    """
    if not outputs or not score_B.requires_grad:
        raise UsageError(
            "no gradient reaches the attention: the model computes without gradients after it; use raw or rollout"
        )
    # the sum gives every image its own gradient, since no image affects the score of another
    gradients = torch.autograd.grad(score_B.sum(), list(outputs), allow_unused=True)
    return [torch.zeros_like(out) if g is None else g for g, out in zip(gradients, outputs, strict=True)]


def weighted_rows(call: Call, gradient: Tensor, queries: slice) -> Tensor:
    """Return relu(A ⊙ dA) for a slice of Q queries, averaged over heads: (B, W, Q, K)."""
    weights_BWHQK = call.rows(queries)
    if call.weights is not None:
        dA = _eager_gradient(call, gradient)[:, :, :, queries]
    else:
        assert call.value is not None
        dO = call.site.canonical(gradient)[:, :, :, queries]
        dA = products(dO.float(), call.value.float())
    return (weights_BWHQK * dA).relu_().mean(2)


def weighted(call: Call, gradient: Tensor) -> Tensor:
    """Return relu(A ⊙ dA) for all queries, averaged over heads: (B, W, Q, K)."""
    batch, windows, heads, queries, keys = call.shape
    out = call.zeros(batch, windows, queries, keys)
    fused = call.weights is None
    gradient_BWHQX = call.site.canonical(gradient) if fused else _eager_gradient(call, gradient)
    for (b, w, chunk), part_bwHQK in call.pieces():
        dA = gradient_BWHQX[b, w, chunk].float()
        if fused:
            assert call.value is not None
            dA = dA @ call.value[b, w, chunk].float().mT
        out[b, w] += (part_bwHQK * dA).relu_().sum(2) / heads
    return out


def _eager_gradient(call: Call, gradient: Tensor) -> Tensor:
    shaped = Call.eager(call.site, gradient).weights
    assert shaped is not None
    return shaped.float()


class GradientAttention(Method):
    """Attention of one layer times its positive gradient: the class token's row of mean_h relu(A_h ⊙ ∂y/∂A_h).

    Based on Grad-SAM (Barkan et al. 2021, 2204.11073, eq. 4); y is the score. Deviation from the paper: the map is one
    row of one layer instead of the sum over all rows and layers. If the layer has no class token and no other queries
    that attend to the grid, the map is the mean over the rows of the patches.

    Args:
        layer: name of a module that attends, or its index among the modules that attend; −1 for the last.
    """

    name = "grad_attention"
    needs = "attention over positions"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(survey.attention)

    def __init__(self, layer: int | str = -1) -> None:
        self.layer = layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        sites = require_attention(self.name, model, images_BCHW).attention
        first = place(self.layer, [site.name for site in sites])
        with Tape(model, first) as tape:
            output = run(model, images_BCHW)
        with torch.enable_grad():
            score_B, target_B = pick(output, target)
            gradient = tape.gradients(score_B)[0]
        call, _ = tape.calls[0]
        site = call.site
        if site.class_query is not None:
            rows_BWQK = weighted_rows(call, gradient, slice(site.class_query, site.class_query + 1))
        else:
            first = site.queries.num_prefix_tokens if site.queries else 0  # leaves out register tokens
            rows_BWQK = weighted(call, gradient)[:, :, first:]
        raw = site.keys.to_grid(rows_BWQK.mean(2), shared=True)
        return Explanation(raw, output, target_B, f"attention of {site.name}")
