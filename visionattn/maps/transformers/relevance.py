"""Attention weighted by how it moves the score.

The gradient of attention is never asked of the model, whose attention stays fused: with O = A V, dA = dO Vᵀ, and dO,
the gradient of the fused call's output, is what autograd gives. Only what follows the first layer in question carries
gradients.

Shapes: B images, W windows, H heads, Q queries, K keys, D channels of a head.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from visionattn.capture.running import run
from visionattn.capture.token_layout import Site
from visionattn.maps.method import Explanation, Method, Target, attending, pick
from visionattn.maps.transformers.gradient_attention import Tape, weighted, weighted_rows
from visionattn.maps.transformers.rollout import Row, check_chain, class_row_only, spread


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
