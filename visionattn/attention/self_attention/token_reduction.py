"""Fewer tokens from layer to layer: likes are merged (ToMe), or those the class token overlooks are pruned (EViT).

Shapes: B batch, N tokens, P prefix tokens (class, registers) first among them, n = N − P patches, C channels, H heads,
D channels of a head, R merged tokens, K kept tokens.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, apply_rot_embed_cat
from timm.models.eva import Eva, EvaAttention, EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ResPostBlock, VisionTransformer
from torch import Tensor, nn

from visionattn.errors import UsageError

_PRE_NORM, _POST_NORM = (Block, EvaBlock), (ResPostBlock, EvaBlockPostNorm)
_ATTENTION = (Attention, EvaAttention, AttentionRope)
_HELD = "_held"  # tokens carry what is known of them from block to block


@dataclass(frozen=True)
class Held:
    """What is known of tokens beside their features.

    Attributes:
        prefix: P.
        size_BN: how many patches each token stands for; None while each stands for one.
        place_Bn: which patch's place each patch token has, −1 for a place of no patch; None while they lie in order.
    """

    prefix: int
    size_BN: Tensor | None = None  # noqa: N815
    place_Bn: Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class Heads:
    """Queries and keys of a block's attention.

    Attributes:
        query_BHND, key_BHND: after their norm, before they are rotated by position.
        rope: the rotation of the patches, as timm's models hand it to their blocks; None without.
        scale: of the logits.
        rotate_half: how timm's attention lays out a rotation.
    """

    query_BHND: Tensor  # noqa: N815
    key_BHND: Tensor  # noqa: N815
    rope: Tensor | None
    scale: float
    rotate_half: bool


class TokenReduction(nn.Module, ABC):
    """Leaves fewer tokens, between the attention and the MLP of some blocks; `reduce_tokens` puts it into a network."""

    needs_class_token = False

    @abstractmethod
    def rates(self, depth: int) -> list[Any]:
        """How far each of `depth` blocks reduces, as `forward` takes it; None where a block does not.

        Raises:
            UsageError: the rates were given for another number of blocks.
        """

    @abstractmethod
    def forward(self, x_BNC: Tensor, held: Held, heads: Heads, rate: Any) -> tuple[Tensor, Held]:
        """Reduce the tokens of one block; prefix tokens stay."""


class TokenMerging(TokenReduction):
    """ToMe (Bolya et al. 2023, 2210.09461, §3): every block merges the `rate` likest pairs of patches.

        A, B = every second patch, and the others
        each of A is joined to the one of B whose key is likest, by the cosine of keys averaged over heads
        the likest `rate` of these pairs are merged:  x = Σ s x / Σ s    over what is merged, s the size of a token
        tokens: prefix, what is left of A, B

    In the blocks that follow, a token counts as often as the patches it stands for (eq. 1): softmax(q kᵀ/√D + log s);
    and so it does where the network pools its tokens at last. No parameters: it can be put into a trained network, or
    trained with; which pairs are merged is not differentiated.

    Deviations from the paper: none in the equations. Which order A has, and how tokens with rotary positions merge, it
    does not say: here A keeps its order, and a token is rotated as the one of B that it was merged into.

    Args:
        rate: r, how many pairs a block merges: one number for every block, or one a block. At most half of the patches
            are merged, where r is more.
        decreasing: 2 r in the first block, and linearly less to none in the last (the paper's decreasing schedule).
    """

    def __init__(self, rate: int | Sequence[int], *, decreasing: bool = False) -> None:
        super().__init__()
        each = [rate] if isinstance(rate, int) else list(rate)
        if not each or min(each) < 0:
            raise ValueError(f"rate must be ≥ 0, in every block; got {rate}")
        if decreasing and not isinstance(rate, int):
            raise ValueError(f"a decreasing schedule is made of one rate, got {rate}")
        self.rate = rate if isinstance(rate, int) else tuple(rate)
        self.decreasing = decreasing

    def extra_repr(self) -> str:
        return f"rate={self.rate}" + (", decreasing=True" if self.decreasing else "")

    def rates(self, depth: int) -> list[int | None]:
        if isinstance(self.rate, tuple):
            _check_length("rate", self.rate, depth)
            each = list(self.rate)
        elif self.decreasing and depth > 1:
            each = [math.floor(2 * self.rate * (1 - block / (depth - 1)) + 0.5) for block in range(depth)]
        else:
            each = [self.rate] * depth
        return [r or None for r in each]

    def forward(self, x_BNC: Tensor, held: Held, heads: Heads, rate: int) -> tuple[Tensor, Held]:
        first, patches = held.prefix, x_BNC.shape[1] - held.prefix
        rate = min(rate, patches // 2)
        if rate == 0:
            return x_BNC, held
        moved_BR, into_BR, kept_BK = likest_pairs(heads.key_BHND[:, :, first:], rate)
        size_BN = held.size_BN
        if size_BN is None:  # counted exactly, in half precision as well
            size_BN = torch.ones(x_BNC.shape[:2], device=x_BNC.device, dtype=_at_least_single(x_BNC))
        size_Ba, size_Bb = size_BN[:, first::2], size_BN[:, first + 1 :: 2]
        moved_size_BR = size_Ba.gather(1, moved_BR)
        total_Bb = size_Bb.scatter_add(1, into_BR, moved_size_BR)
        a_BaC, b_BbC = x_BNC[:, first::2], x_BNC[:, first + 1 :: 2]
        share_BR = moved_size_BR / total_Bb.gather(1, into_BR)
        moved_BRC = a_BaC.gather(1, _along(moved_BR, a_BaC)) * share_BR[..., None].to(x_BNC.dtype)
        b_BbC = b_BbC * (size_Bb / total_Bb)[..., None].to(x_BNC.dtype)
        b_BbC = b_BbC.scatter_add(1, _along(into_BR, b_BbC), moved_BRC)
        x_BNC = torch.cat([x_BNC[:, :first], a_BaC.gather(1, _along(kept_BK, a_BaC)), b_BbC], 1)
        size_BN = torch.cat([size_BN[:, :first], size_Ba.gather(1, kept_BK), total_Bb], 1)
        place_Bn = held.place_Bn
        if heads.rope is not None:
            place_Bn = _places(held, x_BNC, patches)
            place_Bn = torch.cat([place_Bn[:, ::2].gather(1, kept_BK), place_Bn[:, 1::2]], 1)
        return x_BNC, replace(held, size_BN=size_BN, place_Bn=place_Bn)


class TokenPruning(TokenReduction):
    """EViT (Liang et al. 2022, 2202.07800, §3): some blocks keep what the class token attends to, and fuse the rest.

        a = mean over heads of softmax(q kᵀ/√D) of the class token's query, over all tokens
        kept:   the ⌈keep · n⌉ patches of the largest a, in their order
        fused:  one more token behind them, Σ a x over the other patches

    The fused token of one block is a patch like others to the next. No parameters: it can be put into a trained
    network, or trained with; the choice is not differentiated, the weights of the fused token are. For networks with a
    class token.

    Deviations from the paper: none in the equations; as in them the weights of the fused token do not sum to one. How
    rotary positions fuse it does not say: here the fused token is not rotated, as the class token is not.

    Args:
        keep: share of the patches that is kept, in (0, 1]: one number, or one for each of `blocks`.
        blocks: which blocks prune, from 0; None for those at a quarter, half and three quarters, the paper's 3, 6 and 9
            of 12.
        fuse: false drops the rest.
    """

    needs_class_token = True

    def __init__(
        self, keep: float | Sequence[float], *, blocks: Sequence[int] | None = None, fuse: bool = True
    ) -> None:
        super().__init__()
        each = [keep] if isinstance(keep, (int, float)) else list(keep)
        if not each or not all(0 < share <= 1 for share in each):
            raise ValueError(f"keep must be in (0, 1], in every block; got {keep}")
        self.keep = keep if isinstance(keep, (int, float)) else tuple(keep)
        self.blocks = None if blocks is None else tuple(blocks)
        self.fuse = fuse

    def extra_repr(self) -> str:
        return f"keep={self.keep}, blocks={self.blocks}, fuse={self.fuse}"

    def rates(self, depth: int) -> list[float | None]:
        blocks = sorted({depth // 4, depth // 2, 3 * depth // 4}) if self.blocks is None else self.blocks
        if len(set(blocks)) < len(blocks) or not all(0 <= block < depth for block in blocks):
            raise UsageError(f"blocks must be different ones of 0 to {depth - 1}, got {list(blocks)}")
        if isinstance(self.keep, tuple):
            _check_length("keep", self.keep, len(blocks))
        each = self.keep if isinstance(self.keep, tuple) else [self.keep] * len(blocks)
        found: list[float | None] = [None] * depth
        for block, share in zip(blocks, each, strict=True):
            found[block] = share
        return found

    def forward(self, x_BNC: Tensor, held: Held, heads: Heads, rate: float) -> tuple[Tensor, Held]:
        first, patches = held.prefix, x_BNC.shape[1] - held.prefix
        count = math.ceil(rate * patches - 1e-6)  # 0.55 · 100 is a little more than 55
        if count == patches:
            return x_BNC, held
        scores_Bn = class_attention(heads, first)[:, first:]
        kept_BK = scores_Bn.topk(count, 1).indices.sort(1).values
        patches_BnC = x_BNC[:, first:]
        parts = [x_BNC[:, :first], patches_BnC.gather(1, _along(kept_BK, patches_BnC))]
        place_Bn = held.place_Bn
        if heads.rope is not None:
            place_Bn = _places(held, x_BNC, patches).gather(1, kept_BK)
        if self.fuse:
            rest_Bn = scores_Bn.scatter(1, kept_BK, 0).to(x_BNC.dtype)
            parts.append((patches_BnC * rest_Bn[..., None]).sum(1, keepdim=True))
            place_Bn = None if place_Bn is None else F.pad(place_Bn, (0, 1), value=-1)
        return torch.cat(parts, 1), replace(held, place_Bn=place_Bn)


def likest_pairs(key_BHnD: Tensor, rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Bipartite soft matching: which of the even patches go, where to among the odd ones, and which of the even stay.

    Returns:
        moved (B, R) and kept (B, ⌈n/2⌉ − R) among patches 0, 2, 4 …, kept in order; into (B, R) among 1, 3, 5 …
    """
    with torch.no_grad(), torch.autocast(key_BHnD.device.type, enabled=False):  # in half precision many would be alike
        key_BnD = key_BHnD.to(_at_least_single(key_BHnD)).mean(1)
        key_BnD = F.normalize(key_BnD, dim=-1)
        likeness_Ba, likest_Ba = (key_BnD[:, ::2] @ key_BnD[:, 1::2].mT).max(-1)
        order_Ba = likeness_Ba.argsort(1, descending=True)
        moved_BR, kept_BK = order_Ba[:, :rate], order_Ba[:, rate:].sort(1).values
        return moved_BR, likest_Ba.gather(1, moved_BR), kept_BK


def class_attention(heads: Heads, prefix: int) -> Tensor:
    """What the class token attends to, (B, N), the mean over heads."""
    key_BHND = heads.key_BHND
    if heads.rope is not None:
        turned = apply_rot_embed_cat(key_BHND[:, :, prefix:], heads.rope, half=heads.rotate_half)
        key_BHND = torch.cat([key_BHND[:, :, :prefix], turned.to(key_BHND.dtype)], 2)
    query_BHND = heads.query_BHND[:, :, :1]
    groups = query_BHND.shape[1] // key_BHND.shape[1]
    key_BHND = key_BHND.repeat_interleave(groups, 1) if groups > 1 else key_BHND
    logits_BHN = (query_BHND * heads.scale @ key_BHND.mT)[:, :, 0]
    logits_BHN = logits_BHN.to(_at_least_single(logits_BHN))
    # not by softmax: the block's own attention has been computed, and who watches should not take this for another
    return (logits_BHN - logits_BHN.logsumexp(-1, keepdim=True)).exp().mean(1)


class Reduced:
    """What `reduce_tokens` did to a network.

    Attributes:
        reduction: what reduces its tokens.
    """

    def __init__(self, reduction: TokenReduction, undo: list[Any]) -> None:
        self.reduction = reduction
        self._undo = undo

    def __repr__(self) -> str:
        return f"Reduced({self.reduction})"

    def remove(self) -> None:
        """Give the network all its tokens again; it is as it was before. A second call does nothing."""
        while self._undo:
            self._undo.pop()()


def reduce_tokens(model: nn.Module, reduction: TokenReduction) -> Reduced:
    """Let a ViT work with fewer tokens from layer to layer, in place.

    Weights, their names and the network's calls stay as they are. What a network returns beside logits has fewer tokens
    (`forward_features`), or cannot be made (feature maps of `forward_intermediates`).

        >>> import timm, torch
        >>> vit = timm.create_model("test_vit", img_size=160)
        >>> reduced = reduce_tokens(vit, TokenMerging(10))
        >>> vit.forward_features(torch.zeros(1, 3, 160, 160)).shape[1]  # of 101
        41
        >>> reduced.remove()

    Args:
        model: a VisionTransformer or Eva of timm: plain, with registers, with rotary positions, DeiT, DINOv2 and v3,
            EVA and EVA02.
        reduction: `TokenMerging` or `TokenPruning`.

    Returns:
        With `remove()`.

    Raises:
        UsageError: the network's blocks, attention or pooling are others, its tokens are reduced already, or the rates
            do not fit. The network is then as it was.
    """
    kind = type(model).__name__
    if not isinstance(model, (VisionTransformer, Eva)):
        raise UsageError(f"tokens can be reduced in a VisionTransformer or an Eva of timm; this is a {kind}")
    blocks = list(model.blocks)
    for number, block in enumerate(blocks):
        where = f"block {number} of this {kind}"
        if "forward" in vars(block):
            raise UsageError(f"the tokens of {where} are reduced already; remove() that first")
        if type(block) not in _PRE_NORM + _POST_NORM:
            raise UsageError(f"tokens cannot be reduced in {where}, a {type(block).__name__}")
        if type(block.attn) not in _ATTENTION:
            raise UsageError(f"tokens cannot be reduced in {where}, which attends by {type(block.attn).__name__}")
    if reduction.needs_class_token and model.cls_token is None:
        raise UsageError(f"{type(reduction).__name__} needs a class token, and this {kind} has none; take TokenMerging")
    pool = model.attn_pool
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        raise UsageError(f"tokens cannot be reduced where {type(pool).__name__} pools them by their places")
    undo: list[Any] = []
    reduced = False
    for block, rate in zip(blocks, reduction.rates(len(blocks)), strict=True):
        part = _Part(block, reduction, rate, model.num_prefix_tokens, follows=reduced)
        block.forward = part
        undo += [
            partial(delattr, block, "forward"),
            block.attn.q_norm.register_forward_hook(part.keep_query).remove,
            block.attn.k_norm.register_forward_hook(part.keep_key).remove,
        ]
        reduced = reduced or rate is not None
    if reduced:
        model.pool = _Pool(model)
        undo += [partial(delattr, model, "pool"), model.norm.register_forward_hook(_carry).remove]
    return Reduced(reduction, undo)


class _Part:
    """The forward pass of a block whose tokens are reduced between attention and MLP."""

    def __init__(self, block: nn.Module, reduction: TokenReduction, rate: Any, prefix: int, *, follows: bool) -> None:
        self.block: Any = block
        self.reduction, self.rate, self.prefix = reduction, rate, prefix
        self.follows = follows
        self._seen: dict[tuple[str, int], Tensor] = {}

    def keep_query(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self._keep("query", out)

    def keep_key(self, module: nn.Module, args: Any, out: Tensor) -> None:
        self._keep("key", out)

    def _keep(self, name: str, out: Tensor) -> None:
        if self.rate is not None:
            self._seen[name, _thread()] = out

    def __call__(
        self, x_BNC: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UsageError("a network whose tokens are reduced takes no attention mask")
        held = _held(x_BNC, self.prefix, lost=self.follows)
        options = {}
        if held.size_BN is not None:
            options["attn_mask"] = held.size_BN.log()[:, None, None].to(x_BNC.dtype)
        if rope is not None:
            options["rope"] = rope = rope if held.place_Bn is None else _rotations(rope, held.place_Bn)
        block = self.block
        x_BNC = x_BNC + _branch(block, 1, partial(block.attn, **options), x_BNC)
        if self.rate is not None:
            query, key = (self._seen.pop((name, _thread())) for name in ("query", "key"))
            heads = Heads(query, key, rope, block.attn.scale, getattr(block.attn, "rotate_half", False))
            x_BNC, held = self.reduction(x_BNC, held, heads, self.rate)
        x_BNC = x_BNC + _branch(block, 2, block.mlp, x_BNC)
        setattr(x_BNC, _HELD, held)
        return x_BNC


class _Pool:
    """Pools tokens as the network does, each as often as the patches it stands for."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model

    def __call__(self, x_BNC: Tensor, pool_type: str | None = None) -> Tensor:
        model = self.model
        kind = model.global_pool if pool_type is None else pool_type
        if model.attn_pool is None and kind not in ("avg", "avgmax"):
            return type(model).pool(model, x_BNC, pool_type)
        size_BN = _held(x_BNC, model.num_prefix_tokens, lost=True).size_BN
        if size_BN is None:
            return type(model).pool(model, x_BNC, pool_type)
        prefixed = getattr(model, "pool_include_prefix", model.attn_pool is not None)  # Eva: where it attends
        first = 0 if prefixed else model.num_prefix_tokens
        x_BNC, size_BN = x_BNC[:, first:], size_BN[:, first:].to(x_BNC.dtype)
        if model.attn_pool is not None:
            return model.attn_pool(x_BNC, attn_mask=size_BN.log()[:, None, None])
        mean_BC = (x_BNC * (size_BN / size_BN.sum(1, keepdim=True))[..., None]).sum(1)
        return mean_BC if kind == "avg" else 0.5 * (x_BNC.amax(1) + mean_BC)


def _carry(module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    """The norm behind the blocks keeps what is known of the tokens."""
    if (held := getattr(args[0], _HELD, None)) is not None:
        setattr(out, _HELD, held)


def _held(x_BNC: Tensor, prefix: int, *, lost: bool) -> Held:
    held = getattr(x_BNC, _HELD, None)
    if held is None and lost:
        raise UsageError(
            "which patches these tokens stand for is not known: something replaced what a block returned after tokens "
            "were reduced; call the whole network, without anything inserted after its blocks"
        )
    return Held(prefix) if held is None else held


def _branch(block: nn.Module, number: int, run: Any, x_BNC: Tensor) -> Tensor:
    """The residual branch of a block around its attention (1) or its MLP (2), as the block has it."""
    norm, drop = getattr(block, f"norm{number}"), getattr(block, f"drop_path{number}")
    if type(block) in _POST_NORM:
        return drop(norm(run(x_BNC)))
    out_BNC = run(norm(x_BNC))
    if type(block) is Block:
        return drop(getattr(block, f"ls{number}")(out_BNC))
    gamma = getattr(block, f"gamma_{number}")
    return drop(out_BNC if gamma is None else gamma * out_BNC)


def _check_length(name: str, each: Sequence[Any], count: int) -> None:
    if len(each) != count:
        raise UsageError(f"{name} has {len(each)} entries for {count} blocks; give one number, or one a block")


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()  # no graph can be made of the latter


def _at_least_single(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _along(index_BK: Tensor, like_BNC: Tensor) -> Tensor:
    return index_BK[..., None].expand(-1, -1, like_BNC.shape[2])


def _places(held: Held, x_BNC: Tensor, patches: int) -> Tensor:
    if held.place_Bn is not None:
        return held.place_Bn
    return torch.arange(patches, device=x_BNC.device).expand(len(x_BNC), -1)


def _rotations(rope: Tensor, place_Bn: Tensor) -> Tensor:
    """The rotation of each token, (B, 1 or H, n, 2 D), from those of the patches, (n, 2 D) or (H, n, 2 D), which may
    begin with B; none, sin 0 and cos 1, where a token has no place."""
    while rope.ndim < 4:
        rope = rope[None]
    rope = rope.expand(len(place_Bn), -1, -1, -1)
    index = place_Bn.clamp(min=0)[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3])
    none = torch.cat(
        [torch.zeros_like(rope[..., : rope.shape[3] // 2]), torch.ones_like(rope[..., rope.shape[3] // 2 :])], -1
    )
    return torch.where(place_Bn[:, None, :, None] < 0, none[:, :, :1], rope.gather(2, index))
