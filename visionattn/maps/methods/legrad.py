"""LeGrad: the gradient of every layer's own score with respect to its attention.

Shapes: B images, L layers, N tokens, D channels, W windows, H heads, Q queries, K keys, h × w grid.
"""

from collections.abc import Sequence
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from visionattn.capture import Call, Survey, products, survey_images
from visionattn.errors import UsageError
from visionattn.maps.method import Explanation, Method, Target, fitting, layers_source, pick
from visionattn.maps.methods.blocks import (
    Block,
    NeedsAllTokens,
    Trace,
    close,
    last_blocks,
    read_out,
    require_same_score,
    run_again,
    score_of,
)
from visionattn.maps.methods.gradient_attention import gradients_of


class LeGrad(Method):
    """LeGrad (Bousselham et al. 2024, 2404.03214, §3): the mean over layers of the positive gradient of attention.

        E = mean_l mean_{h,q} relu(∂s_l / ∂A_l[h, q])        s_l the score of the tokens that layer l returns

    s_l is what the model's last layers (norm, pooling, head) make of these tokens, in place of the tokens of the last
    layer. The attention itself is not multiplied into the gradient. For ViTs: the layers at the end of the model whose
    blocks return the same tokens (all layers of a ViT, the last stage of a Swin). Attention stays fused.

    Deviation from the paper: with `pooling="model"`, the tokens of every layer are pooled as the model pools those of
    the last. The authors' code averages the tokens of every layer, also where the model reads the class token:
    `pooling="mean"`. If the model reads only the class token, `"model"` costs little more than a forward pass, since
    only this token has a gradient; otherwise all blocks run a second time.

    Args:
        pooling: how to pool the tokens of a layer: as the model pools the last, or by their mean.

    Raises:
        UsageError: pooling is neither model nor mean. When called: the model has no such blocks.
    """

    name = "legrad"
    needs = "attention over positions"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return bool(last_blocks(survey))

    def __init__(self, *, pooling: Literal["model", "mean"] = "model") -> None:
        if pooling not in ("model", "mean"):
            raise UsageError(f"pooling must be model or mean, got {pooling!r}")
        self.pooling = pooling

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        survey = survey_images(model, images_BCHW)
        blocks = require_blocks(self.name, model, survey)
        if self.pooling == "model" and all(block.alone for block in blocks):
            try:
                return self._of_class_token(model, images_BCHW, target, survey, blocks)
            except NeedsAllTokens:
                pass
        return self._of_all_tokens(model, images_BCHW, target, survey, blocks)

    def _of_class_token(
        self, model: nn.Module, images_BCHW: Tensor, target: Target, survey: Survey, blocks: Sequence[Block]
    ) -> Explanation:
        trace = Trace(model, blocks, alone=True)
        output = trace.run(images_BCHW)
        score_B, target_B = pick(output, target)
        again = [run_again(model, ran) for ran in trace.ran]
        with torch.enable_grad():
            if target_B is None:  # a target function gets the output of as many images as it knows
                parts = [each[0] for each in again]
            else:
                parts, target = [torch.cat([each[0] for each in again])], target_B.repeat(len(blocks))
            score_N = torch.cat(
                [read_out(model, images_BCHW, trace.ran, part, partial(score_of, target)) for part in parts]
            )
            if not close(score_N[-len(images_BCHW) :], score_B):
                raise NeedsAllTokens
            gradients = gradients_of(score_N, [each[1] for each in again])
        total_Bhw = torch.zeros(())
        for ran, gradient in zip(trace.ran, gradients, strict=True):
            site, value = ran.block.site, ran.value
            assert value is not None
            dA_B1H1K = products(site.canonical(gradient).float(), value.float())
            count = value.shape[3]  # the other queries have no gradient, and count in the mean over queries
            total_Bhw = total_Bhw + site.keys.to_grid(dA_B1H1K.relu_().mean(2)[:, :, 0] / count, shared=True)
        return Explanation(total_Bhw / len(blocks), output, target_B, layers_source(survey, len(blocks)))

    def _of_all_tokens(
        self, model: nn.Module, images_BCHW: Tensor, target: Target, survey: Survey, blocks: Sequence[Block]
    ) -> Explanation:
        trace = Trace(model, blocks, alone=False)
        output = trace.run(images_BCHW)
        score_B, target_B = pick(output, target)
        total_Bhw = torch.zeros(())
        for ran in trace.ran:
            tokens, leaf, call = run_again(model, ran)
            with torch.enable_grad():
                if self.pooling == "mean":
                    axes = [axis for axis in range(1, tokens.ndim) if axis != ran.block.output.channel_axis]
                    tokens = tokens.mean(axes, keepdim=True).expand_as(tokens)
                score = partial(score_of, target if target_B is None else target_B)
                found_B = read_out(model, images_BCHW, trace.ran, tokens, score)
                if self.pooling == "model" and ran is trace.ran[-1]:
                    require_same_score(self.name, model, ran, found_B, score_B)
                (gradient,) = gradients_of(found_B, [leaf])
            assert call is not None
            rows_BWK = positive_gradient(call, gradient)
            total_Bhw = total_Bhw + ran.block.site.keys.to_grid(rows_BWK, shared=True)
        return Explanation(total_Bhw / len(blocks), output, target_B, layers_source(survey, len(blocks)))


def positive_gradient(call: Call, gradient: Tensor) -> Tensor:
    """Return relu(dA), averaged over heads and queries, (B, W, K).

    Args:
        call: the call of attention.
        gradient: the gradient of its output if the call is fused, else of its weights.
    """
    batch, windows, _, _, keys = call.shape
    out_BWK = call.new(batch, windows, keys)
    if call.weights is not None:
        shaped = Call.eager(call.site, gradient).weights
        assert shaped is not None
        return shaped.float().relu().mean((2, 3))
    assert call.value is not None
    gradient_BWHQD = call.site.canonical(gradient)
    for b in range(batch):
        for w in range(windows):
            out_BWK[b, w] = (gradient_BWHQD[b, w].float() @ call.value[b, w].float().mT).relu_().mean((0, 1))
    return out_BWK


def require_blocks(method: str, model: nn.Module, survey: Survey) -> list[Block]:
    """Return the last blocks of a model.

    Raises:
        UsageError: the model has none; the message names the methods that fit.
    """
    blocks = last_blocks(survey)
    if not blocks:
        raise UsageError(
            f"{method} needs blocks of self-attention that return all tokens, up to the last attention of the model; "
            f"this {type(model).__name__} has none.{fitting(survey)}"
        )
    return blocks
