"""Attention weighted by how it moves the score.

The gradient of attention is never asked of the model, whose attention stays fused: with O = A V, dA = dO Vᵀ, and dO,
the gradient of the fused call's output, is what autograd gives. Only what follows the first layer in question carries
gradients.

Shapes: B images, W windows, H heads, Q queries, K keys, D channels of a head.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from visionattn.errors import UsageError
from visionattn.maps.attention_methods import attending
from visionattn.maps.base import Explanation, Method, Target, pick
from visionattn.maps.chain import Row, spread
from visionattn.maps.keep import Call, products
from visionattn.maps.layout import Site
from visionattn.maps.records import Interception, place
from visionattn.maps.rollout import check_chain, class_row_only
from visionattn.maps.running import run


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


class _Chain(Method):
    """What methods share that carry the class token's row through gradient-weighted layers."""

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        sites = attending(self.name, model, images_BCHW).attention
        check_chain(self.name, sites)
        with Tape(model, 0) as tape:
            output = run(model, images_BCHW)
        with torch.enable_grad():
            score_B, target_B = pick(output, target)
            gradients = tape.gradients(score_B)
        row = start = Row.start(tape.calls[-1][0].site, len(images_BCHW), images_BCHW.device)
        last = True
        while tape.calls:
            call, gradient = tape.calls.pop()[0], gradients.pop()
            site = call.site
            if last and site.class_query is not None:
                weights = weighted_rows(call, gradient, slice(site.class_query, site.class_query + 1))
                site = class_row_only(site)
            else:
                weights = weighted(call, gradient)
            row, last = self.step(row, site, weights), False
        raw_Bhw = self.finish(row, start)
        return Explanation(raw_Bhw, output, target_B, f"all {len(sites)} layers of attention")

    def finish(self, row: Row, start: Row) -> Tensor:
        """Read the map off the row."""
        return row.grid_Bhw

    @abstractmethod
    def step(self, row: Row, site: Site, weights_BWQK: Tensor) -> Row:
        """Carry the row one layer back through relu(A ⊙ dA)."""


class Chefer(_Chain):
    """Relevance through self-attention (Chefer et al. 2021, 2103.15679, eq. 5–6): R ← R + Ā R, the class token's row
    of R.

        Ā = mean_h relu(∂y/∂A_h ⊙ A_h),        R = I at first

    For transformers of one kind of token throughout (ViT, DeiT, BEiT …); elsewhere with a warning, as `Rollout`.
    """

    name = "chefer"

    def step(self, row: Row, site: Site, weights_BWQK: Tensor) -> Row:
        return row.step(site, weights_BWQK)

    def finish(self, row: Row, start: Row) -> Tensor:
        # where there is no class token the row starts on the patches; that share is the same everywhere and shows
        # nothing
        return row.grid_Bhw - spread(start.grid_Bhw, tuple(row.grid_Bhw.shape[1:]))


class GradientRollout(_Chain):
    """Attention rollout through gradient-weighted layers: the class token's row of Â_L … Â_1.

        Â = (Ā + I), every row divided by its sum,        Ā = mean_h relu(∂y/∂A_h ⊙ A_h)

    Rollout (Abnar & Zuidema 2020, 2005.00928) with the weighting of Chefer et al. (2021, 2012.09838, eq. 13–14) in
    place of attention. For the same models as `Rollout`.
    """

    name = "grad_rollout"

    def step(self, row: Row, site: Site, weights_BWQK: Tensor) -> Row:
        return row.step(site, weights_BWQK, normalise=True)
