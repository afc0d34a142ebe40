"""Attention weighted by what it does to each token: Beyond Intuition (token-wise) and TokenTM.

Attention moves a token's *transformed* token, W_O v, and not the token itself. Both methods weigh the attention to a
token by how long its transformed token is compared with the token, and TokenTM also by how much its direction stays.

Shapes: B images, N tokens, D channels, H heads, Q queries, K keys, S steps.
"""

import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture import Args, Call, HeadMean, Kwargs, Site, Survey, products, run, survey_images, surveys
from visionattn.errors import UsageError
from visionattn.maps.method import Explanation, Method, Target, fitting, layers_source, pick
from visionattn.maps.methods.blocks import (
    Block,
    NeedsAllTokens,
    Ran,
    Trace,
    close,
    last_blocks,
    read_out,
    require_same_score,
    run_again,
    score_of,
)
from visionattn.maps.methods.gradient_attention import Tape, gradients_of, weighted, weighted_rows

_SCALE = re.compile(r"gamma|lambda|scale|\bls", re.IGNORECASE)


class Transformations:
    """Measures how the attention and the feed-forward layers of each block transform the tokens.

    Attributes:
        attention: for each block, (B, N): the weight of each transformed token γ W_O v; γ is LayerScale, or 1.
        feed_forward: for each block, (B, N): the weight of the tokens that the feed-forward layers add, or None if the
            block has no norm after its attention. Always None without `direction`.
        length: (B, N), the length of the tokens before the first block.

    Args:
        method: name of the method, for errors.
        model: the model.
        blocks: its blocks.
        direction: also weigh by direction, and measure the feed-forward layers.
    """

    def __init__(self, method: str, model: nn.Module, blocks: Sequence[Block], *, direction: bool) -> None:
        self.method, self.model, self.blocks, self.direction = method, model, blocks, direction
        self.attention: list[Tensor] = []
        self.feed_forward: list[Tensor | None] = []
        self.length: Tensor | None = None
        self._thread, self._depth = threading.get_ident(), surveys()
        self._tokens: Tensor | None = None  # before the block
        self._value: Tensor | None = None  # of the attention, before its projection has run
        self._middle: Tensor | None = None  # tokens between the attention and the feed-forward layers
        self._norm_first = False  # whether the block has normalised its tokens before its attention

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Set hooks on the blocks, and remove them at the end."""
        with contextlib.ExitStack() as stack:
            for block in self.blocks:
                module = self.model.get_submodule(block.name)
                handles = [module.register_forward_pre_hook(self._start, with_kwargs=True)]
                for part in module.modules():
                    if isinstance(part, nn.Linear):
                        handles.append(part.register_forward_pre_hook(self._before_linear))
                    elif isinstance(part, nn.MultiheadAttention):
                        handles.append(part.register_forward_hook(self._after_attention))
                    elif _is_norm(part):
                        handles.append(part.register_forward_pre_hook(self._before_norm))
                handles.append(module.register_forward_hook(self._end))
                for handle in handles:
                    stack.callback(handle.remove)
            yield

    def attended(self, call: Call) -> None:
        """Take the values of a call of attention; the next layer that fits them is their projection."""
        assert call.value is not None
        self._value = call.value.detach()[:, 0].transpose(1, 2).flatten(2)

    @property
    def _off(self) -> bool:
        return threading.get_ident() != self._thread or surveys() != self._depth

    def _start(self, module: nn.Module, *given: Any) -> None:
        if self._off:
            return
        args, kwargs = given  # torch may call the hook in other threads without the keyword arguments
        self._tokens = (args[0] if args else next(iter(kwargs.values()))).detach()
        self._value = self._middle = None
        self._norm_first = False
        if self.length is None:
            self.length = self._tokens.float().norm(dim=-1)

    def _before_linear(self, module: nn.Linear, args: Args) -> None:
        if not self._off and self._value is not None and module.in_features == self._value.shape[2]:
            self._project(module.weight)

    def _after_attention(self, module: nn.MultiheadAttention, args: Args, out: object) -> None:
        if not self._off and self._value is not None:
            self._project(module.out_proj.weight)

    def _before_norm(self, module: nn.Module, args: Args) -> None:
        if self._off or self._tokens is None or args[0].shape != self._tokens.shape:
            return
        if len(self.attention) == len(self.feed_forward):  # the projection has not run
            self._norm_first |= args[0].data_ptr() == self._tokens.data_ptr()
        elif not self._norm_first:
            raise UsageError(
                f"{self.method} needs blocks that normalise their tokens before the attention, and {self._block.name} "
                "does so after it; use chefer"
            )
        elif self.direction and self._middle is None:
            self._middle = args[0].detach().clone()  # a later in-place operation would change it

    @property
    def _block(self) -> Block:
        """The block that is running."""
        return self.blocks[len(self.feed_forward)]

    def _project(self, weight: Tensor) -> None:
        assert self._value is not None
        assert self._tokens is not None
        with torch.no_grad():
            transformed_BND = F.linear(self._value, weight.to(self._value.dtype))
            scale_D = _layer_scale(self.model, self._block, transformed_BND.shape[2])
            if scale_D is not None:
                transformed_BND = transformed_BND * scale_D
            self.attention.append(self._weights(self._tokens, transformed_BND))
        self._value = None

    def _end(self, module: nn.Module, args: Args, out: object) -> None:
        if self._off:
            return
        if len(self.attention) == len(self.feed_forward):
            raise UsageError(
                f"no linear layer follows the attention of {self._block.name}, so its transformed tokens are not known"
            )
        tokens = out[0] if isinstance(out, (tuple, list)) else out
        assert isinstance(tokens, Tensor)  # of a block of a transformer
        tokens = tokens.detach()
        middle = self._middle
        self.feed_forward.append(None if middle is None else self._weights(middle, tokens - middle))

    def _weights(self, before_BND: Tensor, after_BND: Tensor) -> Tensor:
        before_BND, after_BND = before_BND.float(), after_BND.float()
        tiny = torch.finfo(torch.float32).tiny
        ratio_BN = after_BND.norm(dim=-1) / before_BND.norm(dim=-1).clamp(min=tiny)
        if not self.direction:
            return ratio_BN
        similar_BN = F.cosine_similarity(before_BND, after_BND, dim=-1).exp()
        return ratio_BN * similar_BN / similar_BN.mean(1, keepdim=True)


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _layer_scale(model: nn.Module, block: Block, channels: int) -> Tensor | None:
    """Return LayerScale's γ, (D,): the parameter of a block that scales what its attention adds; None without one.

    It is the first parameter of D values whose name says so: `ls1.gamma` and `gamma_1` in timm, `layer_scale1.lambda1`
    and `lambda_1` in transformers. The second one scales the feed-forward layers, whose effect is measured.
    """
    module, attention = model.get_submodule(block.name), block.site.name
    for name, part in module.named_modules(prefix=block.name):
        inside_attention = attention != block.name and f"{name}.".startswith(f"{attention}.")
        if inside_attention or isinstance(part, nn.Linear) or _is_norm(part):
            continue
        for own, parameter in part.named_parameters(recurse=False):
            if parameter.numel() == channels and _SCALE.search(f"{name}.{own}".removeprefix(block.name)):
                return parameter.flatten()
    return None


def _fits(survey: Survey) -> bool:
    blocks = last_blocks(survey)
    complete = 0 < len(blocks) == len(survey.attention) and not survey.unlabelled  # relevance starts at the first layer
    return complete and all(map(_of_all_tokens, blocks))


def _of_all_tokens(block: Block) -> bool:
    """Return whether a block maps (B, N, D) to (B, N, D), and all its tokens attend to all tokens in a fused call."""
    site, output = block.site, block.output
    if site.queries is None or site.windowed or not site.fused or output.channel_axis != 2:
        return False
    same = torch.equal(site.queries.index_WN, site.keys.index_WN)
    return same and torch.equal(output.tokens.index_WN, site.keys.index_WN)


def _require(method: str, model: nn.Module, survey: Survey) -> list[Block]:
    """Return the last blocks of a model.

    Raises:
        UsageError: there are none that fit; the message names the methods that fit.
    """
    if not _fits(survey):
        raise UsageError(
            f"{method} needs a ViT: all layers of attention in blocks in which all tokens attend to all tokens by "
            f"scaled_dot_product_attention; this {type(model).__name__} has others.{fitting(survey)}"
        )
    return last_blocks(survey)


class TokenTM(Method):
    """TokenTM (Wu et al. 2024, 2403.14552, §3.2–3.3): relevance of tokens that grow and turn from layer to layer.

        C ← diag(‖e_i‖)                       e the tokens before the first block
        C ← C + Ā W C                         attention; Ā = mean_h relu(∂y/∂A_h ⊙ A_h)
        C ← C + W C                           feed-forward layers
        W = diag(‖ẽ_i‖ / ‖e_i‖ · exp cos(ẽ_i, e_i) / mean_k exp cos(ẽ_k, e_k))

    ẽ is the transformed token: W_O v in the attention (times γ, if the block has LayerScale), and what the feed-forward
    layers add. The map is the class token's row of C or, if the score does not depend on a class token, the mean of the
    patches' rows. For ViTs in which all tokens attend to all tokens, and whose blocks normalise before the attention
    (timm, torchvision, transformers). Attention stays fused.

    The equations are written from the paper's description and were not compared with the authors' code. Deviations: e
    is the token before the norm of the block, ẽ of the attention is taken for all heads together and without the bias
    of W_O, and feed-forward layers that run beside the attention are left out.

    Raises:
        UsageError: when called, the model has no such blocks.
    """

    name = "tokentm"
    needs = "attention over positions"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return _fits(survey)

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        survey = survey_images(model, images_BCHW)
        blocks = _require(self.name, model, survey)
        transformations = Transformations(self.name, model, blocks, direction=True)
        with transformations.watch(), _TransformedTape(model, blocks, transformations) as tape:
            output = run(model, images_BCHW)
        with torch.enable_grad():
            score_B, target_B = pick(output, target)
            gradients = tape.gradients(score_B)
        site = blocks[-1].site
        rows_BQN, selected = _start(site, site.canonical(gradients[-1])[:, 0])
        for number in reversed(range(len(blocks))):
            call, gradient = tape.calls[number][0], gradients[number]
            feed_forward_BN = transformations.feed_forward[number]
            if feed_forward_BN is not None:
                rows_BQN = rows_BQN * (1 + feed_forward_BN[:, None])
            if number == len(blocks) - 1 and selected.stop == 1:
                moved_BQN = rows_BQN[:, :, :1] @ weighted_rows(call, gradient, selected)[:, 0]
            else:
                moved_BQN = rows_BQN @ weighted(call, gradient)[:, 0]
            rows_BQN = rows_BQN + moved_BQN * transformations.attention[number][:, None]
        assert transformations.length is not None
        raw_BN = rows_BQN.mean(1) * transformations.length
        return Explanation(site.keys.to_grid(raw_BN[:, None]), output, target_B, layers_source(survey, len(blocks)))


class _TransformedTape(Tape):
    """Records the calls of attention of some blocks, and measures their transformed tokens."""

    def __init__(self, model: nn.Module, blocks: Sequence[Block], transformations: Transformations) -> None:
        super().__init__(model, blocks[0].turn)
        self.transformations = transformations

    def attended(self, call: Call, out: Tensor, kept: Tensor | None) -> Tensor | None:
        self.transformations.attended(call)
        return super().attended(call, out, kept)


def _start(site: Site, gradient_BHQX: Tensor) -> tuple[Tensor, slice]:
    """Return the rows of the identity whose relevance is propagated, (B, Q, N), and their slice.

    This is the class token's row if the score depends on it, and otherwise the rows of all patches.

    Args:
        site: the last call of attention.
        gradient_BHQX: the gradient of its weights or of its output, of all queries or of the class token alone.
    """
    count, first = site.keys.index_WN.shape[1], site.num_prefix_tokens
    alone = gradient_BHQX.shape[2] == 1
    reads_class = alone or (site.class_query == 0 and bool(gradient_BHQX[:, :, 0].any()))
    selected = slice(0, 1) if reads_class else slice(first, count)
    rows_QN = torch.eye(count, device=gradient_BHQX.device)[selected]
    return rows_QN.expand(len(gradient_BHQX), -1, -1), selected


class BeyondIntuition(Method):
    """Beyond Intuition, token-wise (Chen et al. 2023, TMLR): how tokens form the output × what the output asks for.

        R = (I + Ā_L M_L) … (I + Ā_1 M_1),        M = diag(‖W_O v_i‖ / ‖z_i‖)        z the tokens before the block
        F = mean_h relu(mean_s ∂y_s/∂A_L)         the gradient of the last attention, averaged along a path
        map = (F ⊙ R)[class token]

    Ā is the mean over heads. W_O v is multiplied by γ if the block has LayerScale. If the score does not depend on a
    class token, the map is the mean of the patches' rows. For ViTs in which all tokens attend to all tokens, and whose
    blocks normalise before the attention (timm, torchvision, transformers). Attention stays fused.

    Written from the authors' code (`generate_ours_c`). Deviations: the code averages the gradient over images that are
    scaled from 0 to 1 (`path="image"`: a forward pass and a gradient for each step). By default the last attention map
    is scaled instead, as integrated gradients of this map would be, which runs only its block and the head again. The
    code leaves out the first layers (`first=5` of 12); by default all layers are used. The output bias is left out.

    Args:
        steps: number of points on the path, ≥ 1; 20 in the authors' code. One step takes the gradient at the end.
        path: what is scaled from 0 to 1: the last attention map, or the image.
        first: index of the first layer to use.

    Raises:
        UsageError: an argument is out of range. When called: the model has no such blocks.
    """

    name = "beyond_intuition"
    needs = "attention over positions"
    cost = "a forward and a backward pass"

    @classmethod
    def fits(cls, survey: Survey) -> bool:
        return _fits(survey)

    def __init__(self, *, steps: int = 20, path: Literal["attention", "image"] = "attention", first: int = 0) -> None:
        if steps < 1:
            raise UsageError(f"steps must be at least 1, got {steps}")
        if path not in ("attention", "image"):
            raise UsageError(f"path must be attention or image, got {path!r}")
        if first < 0:
            raise UsageError(f"first must be at least 0, got {first}")
        self.steps, self.path, self.first = steps, path, first

    def passes(self, model: nn.Module, images_BCHW: Tensor) -> int:
        """See `Method.passes`."""
        return 2 + 2 * self.steps if self.path == "image" else 3

    def explain(self, model: nn.Module, images_BCHW: Tensor, target: Target) -> Explanation:
        survey = survey_images(model, images_BCHW)
        blocks = _require(self.name, model, survey)
        if self.first >= len(blocks):
            raise UsageError(
                f"there is no layer {self.first}: beyond_intuition uses {len(blocks)} layers of this model"
            )
        if self.path == "attention" and blocks[-1].alone:
            try:
                return self._explain_by(model, images_BCHW, target, survey, blocks, alone=True)
            except NeedsAllTokens:
                pass
        return self._explain_by(model, images_BCHW, target, survey, blocks, alone=False)

    def _explain_by(
        self,
        model: nn.Module,
        images_BCHW: Tensor,
        target: Target,
        survey: Survey,
        blocks: Sequence[Block],
        *,
        alone: bool,
    ) -> Explanation:
        transformations = Transformations(self.name, model, blocks, direction=False)
        with transformations.watch():
            trace = _Mean(model, blocks, transformations, alone=alone)
            output = trace.run(images_BCHW)
        score_B, target_B = pick(output, target)
        explained = target if target_B is None else target_B
        if self.path == "attention":
            gradient_BHQK = self._along_attention(model, images_BCHW, explained, trace.ran, score_B)
        else:
            gradient_BHQK = self._along_image(model, images_BCHW, explained, blocks)
        site = blocks[-1].site
        rows_BQN, selected = _start(site, gradient_BHQK)
        for number in reversed(range(self.first, len(blocks))):
            mean_BQK = trace.means.pop()
            chosen_BQN = rows_BQN[
                :, :, : mean_BQK.shape[1]
            ]  # of the last layer, only the class token's row may be kept
            rows_BQN = rows_BQN + (chosen_BQN @ mean_BQK) * transformations.attention[number][:, None]
        raw_BN = (gradient_BHQK.relu().mean(1)[:, selected] * rows_BQN).mean(1)
        return Explanation(site.keys.to_grid(raw_BN[:, None]), output, target_B, layers_source(survey, len(blocks)))

    def _along_attention(
        self, model: nn.Module, images_BCHW: Tensor, target: Target, ran: Sequence[Ran], score_B: Tensor
    ) -> Tensor:
        """Return the mean gradient of the last attention while this attention is scaled from 0 to 1, (B, H, Q, K).

        The output of attention is linear in its weights, so scaling the output scales the weights.

        Raises:
            NeedsAllTokens: the class token cannot run alone.
        """
        last, alone = ran[-1], ran[-1].out is not None
        tokens, leaf, call = run_again(model, last)
        found_B = read_out(model, images_BCHW, ran, tokens, partial(score_of, target))
        if alone and not close(found_B, score_B):
            raise NeedsAllTokens
        require_same_score(self.name, model, last, found_B, score_B)
        scales, total = _path(self.steps), torch.zeros_like(leaf)
        # the class token alone is so little work that all steps run together, unless a function scores each batch
        together = self.steps if alone and isinstance(target, Tensor) else 1
        for start in range(0, self.steps, together):
            part = scales[start : start + together]
            scaled = torch.cat([leaf.detach() * scale for scale in part]).requires_grad_()
            tokens, _, _ = run_again(model, last, scaled)
            repeated = target.repeat(len(part)) if isinstance(target, Tensor) else target
            with torch.enable_grad():
                score_N = read_out(model, images_BCHW, ran, tokens, partial(score_of, repeated))
                (gradient,) = gradients_of(score_N, [scaled])
            total += gradient.unflatten(0, (len(part), len(score_B))).sum(0) / self.steps
        value = last.value if call is None else call.value
        assert value is not None
        return products(last.block.site.canonical(total).float(), value.float())[:, 0]

    def _along_image(self, model: nn.Module, images_BCHW: Tensor, target: Target, blocks: Sequence[Block]) -> Tensor:
        """Return the mean gradient of the last attention while the image is scaled from 0 to 1, (B, H, Q, K)."""
        total: Tensor | float = 0.0
        for scale in _path(self.steps):
            with Tape(model, blocks[-1].turn) as tape:
                output = run(model, images_BCHW * scale)
            with torch.enable_grad():
                (gradient,) = tape.gradients(pick(output, target)[0])
            call = tape.calls[0][0]
            assert call.value is not None
            total = total + products(call.site.canonical(gradient).float(), call.value.float())[:, 0] / self.steps
        assert isinstance(total, Tensor)
        return total


def _path(steps: int) -> list[float]:
    """Return the points on a path from 0 to 1; only 1 for one step."""
    return torch.linspace(0, 1, steps).tolist() if steps > 1 else [1.0]


class _Mean(Trace):
    """Keeps the mean over heads of each block's attention, and what the last block needs to run again."""

    def __init__(
        self, model: nn.Module, blocks: Sequence[Block], transformations: Transformations, *, alone: bool
    ) -> None:
        super().__init__(model, blocks, alone=alone)
        self.transformations = transformations
        self.means: list[Tensor] = []
        self._mean = HeadMean()

    @property
    def _row(self) -> bool:
        """Whether this call is the last one, and only its class token's row is needed."""
        return self.alone and self.turn == self.blocks[-1].turn

    def wants(self, site: Site) -> bool:
        return self.turn in self._turns

    def instead(self, call: Call) -> tuple[Tensor, Tensor] | None:
        return None if self._row else self._mean.instead(call)

    def attended(self, call: Call, out: Tensor, kept: Tensor | None) -> None:
        self.transformations.attended(call)
        if self._row:
            super().attended(call, out, kept)
            self.means.append(call.rows(slice(0, 1)).mean(2)[:, 0])
        else:
            self.means.append((self._mean(call) if kept is None else kept)[:, 0])

    def keep(self, block: Block, args: Args, kwargs: Kwargs, out: object) -> None:
        if block is self.blocks[-1]:
            super().keep(block, args, kwargs, out)
        else:
            self.skip(block, out)
