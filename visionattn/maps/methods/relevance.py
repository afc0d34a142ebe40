"""Relevance through all layers, with attention weighted by its gradient: Chefer's method and gradient rollout.

Fused attention stays fused: `scaled_dot_product_attention` returns only O = A V, so the gradient of the attention A is
computed as dA = dO Vᵀ. Autograd computes dO, the gradient of O. Only layers after the first layer of attention carry
gradients.

Shapes: B images, W windows, H heads, Q queries, K keys, D channels of a head.
"""

from abc import abstractmethod

import torch
from torch import Tensor, nn

from visionattn.capture import Site, Survey, run
from visionattn.maps.method import Explanation, Method, Target, layers_source, pick, require_attention
from visionattn.maps.methods.gradient_attention import Tape, weighted, weighted_rows
from visionattn.maps.methods.rollout import Row, check_chain, class_row_only, spread


class _Chain(Method):
    """Base class of methods that propagate the class token's relevance back through gradient-weighted attention."""

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        survey = require_attention(self.name, model, images_BCHW)
        check_chain(self.name, survey)
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
        return Explanation(raw_Bhw, output, target_B, layers_source(survey, len(survey.attention)))

    def finish(self, row: Row, start: Row) -> Tensor:
        """Return the map (B, h, w) from the row at the first layer."""
        return row.grid_Bhw

    @abstractmethod
    def step(self, row: Row, site: Site, weights_BWQK: Tensor) -> Row:
        """Propagate the row back through one layer with the weights relu(A ⊙ dA)."""


class Chefer(_Chain):
    """Relevance through self-attention (Chefer et al. 2021, 2103.15679, eq. 5–6): the class token's row of R.

        R ← R + Ā R,        Ā = mean_h relu(∂y/∂A_h ⊙ A_h),        R = I initially

    For transformers whose layers all attend to the same tokens (ViT, DeiT, BEiT …). Other transformers get a map and a
    warning, as with `Rollout`.
    """

    name = "chefer"
    needs = "attention over positions"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(survey.attention)

    def step(self, row: Row, site: Site, weights_BWQK: Tensor) -> Row:
        return row.step(site, weights_BWQK)

    def finish(self, row: Row, start: Row) -> Tensor:
        # every step keeps the start row, so its relevance on the patches (0 with a class token) is subtracted
        return row.grid_Bhw - spread(start.grid_Bhw, tuple(row.grid_Bhw.shape[1:]))


class GradientRollout(_Chain):
    """Attention rollout through gradient-weighted layers: the class token's row of Â_L … Â_1.

        Â = (Ā + I), every row divided by its sum,        Ā = mean_h relu(∂y/∂A_h ⊙ A_h)

    This is rollout (Abnar & Zuidema 2020, 2005.00928) of attention weighted by its gradient, as in Chefer et al. (2021,
    2012.09838, eq. 13–14). For the same models as `Rollout`.
    """

    name = "grad_rollout"
    needs = "attention over positions"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(survey.attention)

    def step(self, row: Row, site: Site, weights_BWQK: Tensor) -> Row:
        return row.step(site, weights_BWQK, normalise=True)
