"""Attention weighed by its gradient, from the gradient of the fused call's output.

Shapes: B images, W windows, H heads, Q queries, K keys, D channels of a head, h × w grid.
"""

import torch
from torch import Tensor, nn

from visionattn.capture.recording import Interception, place
from visionattn.capture.reductions import Call, products
from visionattn.capture.running import run
from visionattn.capture.token_layout import Site
from visionattn.errors import UsageError
from visionattn.maps.method import Explanation, Method, Target, attending, pick


class Tape(Interception):
    """Keeps the calls from layer `first` on, with their outputs in the graph, which starts there."""

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
            torch.set_grad_enabled(True)  # in the middle of the forward pass: what lies before needs no graph
            out = out.detach().requires_grad_(True)
            self.calls.append((call, out))
            return out.clone()  # so that nothing done in place spoils the leaf
        self.calls.append((call, out))
        return None

    def end(self) -> None:
        torch.set_grad_enabled(self._before)

    def gradients(self, score_B: Tensor) -> list[Tensor]:
        """Gradient of the score by each kept output; the images of a batch do not touch each other."""
        if not self.calls or not score_B.requires_grad:
            raise UsageError(
                "no gradient reaches the attention: the model computes without gradients after it; use raw or rollout"
            )
        found = torch.autograd.grad(score_B.sum(), [out for _, out in self.calls], allow_unused=True)
        return [torch.zeros_like(out) if g is None else g for g, (_, out) in zip(found, self.calls, strict=True)]


def weighted_rows(call: Call, gradient: Tensor, queries: slice) -> Tensor:
    """relu(A ⊙ dA), mean over heads, of some queries: (B, W, those, K)."""
    weights_BWHQK = call.rows(queries)
    if call.weights is not None:
        dA = _eager_gradient(call, gradient)[:, :, :, queries]
    else:
        assert call.value is not None
        dO = call.site.canonical(gradient)[:, :, :, queries]
        dA = products(dO.float(), call.value.float())
    return (weights_BWHQK * dA).relu_().mean(2)


def weighted(call: Call, gradient: Tensor) -> Tensor:
    """relu(A ⊙ dA), mean over heads, of all queries: (B, W, Q, K)."""
    batch, windows, heads, queries, keys = call.shape
    out = call.zeros(batch, windows, queries, keys)
    fused = call.weights is None
    gradient_BWHQX = call.site.canonical(gradient) if fused else _eager_gradient(call, gradient)
    for (b, w, some), part_bwHQK in call.pieces():
        dA = gradient_BWHQX[b, w, some].float()
        if fused:
            assert call.value is not None
            dA = dA @ call.value[b, w, some].float().mT
        out[b, w] += (part_bwHQK * dA).relu_().sum(2) / heads
    return out


def _eager_gradient(call: Call, gradient: Tensor) -> Tensor:
    shaped = Call.eager(call.site, gradient).weights
    assert shaped is not None
    return shaped.float()


class GradientAttention(Method):
    """Attention of one layer times its positive gradient, mean over heads: mean_h relu(A_h ⊙ ∂y/∂A_h), class token's
    row.

    After Grad-SAM (Barkan et al. 2021, 2204.11073, eq. 4), of one layer and one row rather than the sum over all. For
    models whose layer has a class token or other queries that read the grid; elsewhere the mean over the patches.

    Args:
        layer: name of a module that attends, or its place in their order; −1 for the last.
    """

    name = "grad_attention"

    def __init__(self, layer: int | str = -1) -> None:
        self.layer = layer

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        sites = attending(self.name, model, images_BCHW).attention
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
            first = site.queries.num_prefix_tokens if site.queries else 0  # registers are no patches
            rows_BWQK = weighted(call, gradient)[:, :, first:]
        raw = site.keys.to_grid(rows_BWQK.mean(2), shared=True)
        return Explanation(raw, output, target_B, f"attention of {site.name}")
