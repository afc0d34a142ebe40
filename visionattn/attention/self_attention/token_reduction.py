"""Token reduction: merge similar tokens (ToMe) or prune tokens with little class attention (EViT).

Shapes: B batch, N tokens: first P prefix tokens (class, registers), then n = N − P patches; C channels, H heads, D
channels of a head, R merged tokens, K kept tokens.
"""

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
_HELD = "_held"  # attribute of the tokens' tensor that carries a `Held` from block to block


@dataclass(frozen=True)
class Held:
    """Sizes and positions of reduced tokens.

    Attributes:
        prefix: P.
        size_BN: number of patches that each token represents; None while every token represents one.
        place_Bn: for each patch token, the index of the patch whose position the token has, or −1 for no position; None
            while the tokens are the patches in order.
    """

    prefix: int
    size_BN: Tensor | None = None  # noqa: N815
    place_Bn: Tensor | None = None  # noqa: N815


@dataclass(frozen=True)
class Heads:
    """Queries and keys of a block's attention.

    Attributes:
        query_BHND, key_BHND: after their norm, before the rotary embedding.
        rope: rotary embedding of the patches, as timm's models pass it to their blocks; None if the model has none.
        scale: factor of the logits.
        rotate_half: layout of the rotary embedding in timm's attention.
    """

    query_BHND: Tensor  # noqa: N815
    key_BHND: Tensor  # noqa: N815
    rope: Tensor | None
    scale: float
    rotate_half: bool


class TokenReduction(nn.Module, ABC):
    """Base of the token reductions, applied between attention and MLP of some blocks by `reduce_tokens`."""

    needs_class_token = False

    @abstractmethod
    def rates(self, depth: int) -> Sequence[float | None]:
        """Return the rate that `forward` gets in each of `depth` blocks; None for blocks without reduction.

        Raises:
            UsageError: the rates were given for another number of blocks.
        """

    @abstractmethod
    def forward(self, x_BNC: Tensor, held: Held, heads: Heads, rate: Any) -> tuple[Tensor, Held]:  # int or float
        """Reduce the tokens (B, N, C) of one block; prefix tokens stay."""


class TokenMerging(TokenReduction):
    """ToMe (Bolya et al. 2023, 2210.09461, §3): every block merges the `rate` most similar pairs of patches.

        A = patches 0, 2, 4 …,  B = patches 1, 3, 5 …
        each patch of A is paired with the most similar patch of B, by the cosine of keys averaged over heads
        the `rate` most similar pairs are merged:  x = Σ s x / Σ s    over the pair
        s is the number of patches that a token represents
        order of the tokens: prefix, unmerged patches of A, B

    In later blocks a token is weighted by s (eq. 1): softmax(q kᵀ/√D + log s). The network's final pooling weights the
    tokens by s too. The module has no parameters, so it can be used in training or put into a trained network. The
    choice of pairs has no gradient.

    Deviations from the paper: none in the equations. The paper leaves two details open: here the unmerged patches of
    A keep their order, and with rotary positions a merged token has the rotation of its patch of B.

    Args:
        rate: r, number of pairs that a block merges: one number for all blocks, or one per block. A block merges at
            most half of its patches into others.
        decreasing: merge 2 r pairs in the first block and linearly fewer in later blocks, down to none in the last (the
            paper's decreasing schedule; default: False).

    Raises:
        ValueError: a rate is negative, or `decreasing` is combined with one rate per block.
    """

    def __init__(self, rate: int | Sequence[int], *, decreasing: bool = False) -> None:
        super().__init__()
        each = [rate] if isinstance(rate, int) else list(rate)
        if not each or min(each) < 0:
            raise ValueError(f"rate must be ≥ 0, in every block; got {rate}")
        if decreasing and not isinstance(rate, int):
            raise ValueError(f"a decreasing schedule needs a single rate, got {rate}")
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
        moved_BR, into_BR, kept_BK = most_similar_pairs(heads.key_BHND[:, :, first:], rate)
        size_BN = held.size_BN
        if size_BN is None:  # bfloat16 cannot represent every count
            size_BN = torch.ones(x_BNC.shape[:2], device=x_BNC.device, dtype=_at_least_single(x_BNC))
        size_Ba, size_Bb = size_BN[:, first::2], size_BN[:, first + 1 :: 2]
        moved_size_BR = size_Ba.gather(1, moved_BR)
        total_Bb = size_Bb.scatter_add(1, into_BR, moved_size_BR)
        a_BaC, b_BbC = x_BNC[:, first::2], x_BNC[:, first + 1 :: 2]
        fraction_BR = moved_size_BR / total_Bb.gather(1, into_BR)
        moved_BRC = a_BaC.gather(1, _along(moved_BR, a_BaC)) * fraction_BR[..., None].to(x_BNC.dtype)
        b_BbC = b_BbC * (size_Bb / total_Bb)[..., None].to(x_BNC.dtype)
        b_BbC = b_BbC.scatter_add(1, _along(into_BR, b_BbC), moved_BRC)
        x_BNC = torch.cat([x_BNC[:, :first], a_BaC.gather(1, _along(kept_BK, a_BaC)), b_BbC], 1)
        size_BN = torch.cat([size_BN[:, :first], size_Ba.gather(1, kept_BK), total_Bb], 1)
        place_Bn = held.place_Bn
        if heads.rope is not None:
            place_Bn = _places(held, x_BNC, patches)
            place_Bn = torch.cat([place_Bn[:, ::2].gather(1, kept_BK), place_Bn[:, 1::2]], 1)
        return x_BNC, Held(held.prefix, size_BN, place_Bn)


class TokenPruning(TokenReduction):
    """EViT (Liang et al. 2022, 2202.07800, §3): some blocks keep the patches with most class attention, fuse the rest.

        a = mean over heads of softmax(q kᵀ/√D) of the class token's query, over all tokens
        kept:   the ⌈keep · n⌉ patches of the largest a, in their order
        fused:  one more token after them, Σ a x over the other patches

    The next pruning block treats the fused token as a patch. The module has no parameters, so it can be used in
    training or put into a trained network. The choice of patches has no gradient; the weights of the fused token have
    one. The network needs a class token.

    Deviations from the paper: none in the equations; as in the paper, the weights of the fused token do not sum to one.
    The paper does not say how rotary positions are fused: here the fused token is not rotated, like the class token.

    Args:
        keep: fraction of the patches that is kept, in (0, 1]: one number, or one for each of `blocks`.
        blocks: indices of the pruning blocks, from 0 (default: the blocks at a quarter, half and three quarters of the
            depth; with 12 blocks, these are 3, 6 and 9, as in the paper).
        fuse: add the fused token (default: True); False drops the rest.

    Raises:
        ValueError: keep is not in (0, 1].
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
            raise UsageError(f"blocks must be distinct numbers from 0 to {depth - 1}, got {list(blocks)}")
        if isinstance(self.keep, tuple):
            _check_length("keep", self.keep, len(blocks))
        each = self.keep if isinstance(self.keep, tuple) else [self.keep] * len(blocks)
        by_block: list[float | None] = [None] * depth
        for block, fraction in zip(blocks, each, strict=True):
            by_block[block] = fraction
        return by_block

    def forward(self, x_BNC: Tensor, held: Held, heads: Heads, rate: float) -> tuple[Tensor, Held]:
        first, patches = held.prefix, x_BNC.shape[1] - held.prefix
        count = math.ceil(rate * patches - 1e-6)  # in floating point 0.55 · 100 is slightly more than 55
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
        return torch.cat(parts, 1), Held(held.prefix, held.size_BN, place_Bn)


def most_similar_pairs(key_BHnD: Tensor, rate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Match each even patch with its most similar odd patch, and choose the R most similar pairs (bipartite matching).

    Returns:
        moved (B, R), the even patch of each pair; into (B, R), its odd patch; kept (B, ⌈n/2⌉ − R), the other even
        patches, in order. Indices of even patches count patches 0, 2, 4 …; indices of odd patches count 1, 3, 5 …
    """
    with torch.no_grad(), torch.autocast(key_BHnD.device.type, enabled=False):  # half precision would cause many ties
        key_BnD = key_BHnD.to(_at_least_single(key_BHnD)).mean(1)
        key_BnD = F.normalize(key_BnD, dim=-1)
        similarity_Ba, partner_Ba = (key_BnD[:, ::2] @ key_BnD[:, 1::2].mT).max(-1)
        order_Ba = similarity_Ba.argsort(1, descending=True)
        moved_BR, kept_BK = order_Ba[:, :rate], order_Ba[:, rate:].sort(1).values
        return moved_BR, partner_Ba.gather(1, moved_BR), kept_BK


def class_attention(heads: Heads, prefix: int) -> Tensor:
    """Return the attention of the class token to all tokens, (B, N), averaged over heads."""
    key_BHND = heads.key_BHND
    if heads.rope is not None:
        rotated = apply_rot_embed_cat(key_BHND[:, :, prefix:], heads.rope, half=heads.rotate_half)
        key_BHND = torch.cat([key_BHND[:, :, :prefix], rotated.to(key_BHND.dtype)], 2)
    query_BHND = heads.query_BHND[:, :, :1]
    groups = query_BHND.shape[1] // key_BHND.shape[1]
    key_BHND = key_BHND.repeat_interleave(groups, 1) if groups > 1 else key_BHND
    logits_BHN = (query_BHND * heads.scale @ key_BHND.mT)[:, :, 0]
    logits_BHN = logits_BHN.to(_at_least_single(logits_BHN))
    # not written as softmax, since `capture` would record that as a second attention of the block
    return (logits_BHN - logits_BHN.logsumexp(-1, keepdim=True)).exp().mean(1)


class Reduced:
    """A network with reduced tokens, as `reduce_tokens` returns it.

    Attributes:
        reduction: the reduction in use.
    """

    def __init__(self, reduction: TokenReduction, undo: list[Callable[[], object]]) -> None:
        self.reduction = reduction
        self._undo = undo

    def __repr__(self) -> str:
        return f"Reduced({self.reduction})"

    def remove(self) -> None:
        """Undo the reduction, and so restore the network. A second call has no effect."""
        while self._undo:
            self._undo.pop()()


def refuse_reduced_tokens(model: nn.Module) -> None:
    """Refuse a network that drops or merges tokens, since inserted or swapped attention needs the whole grid.

    Raises:
        UsageError: the network has reduced tokens.
    """
    if any(isinstance(vars(part).get("forward"), _ReducedBlock) for part in model.modules()):
        raise UsageError(
            f"the tokens of this {type(model).__name__} are reduced; remove() the reduction first, and reduce the "
            "tokens again if the changed network allows it"
        )


def reduce_tokens(model: nn.Module, reduction: TokenReduction) -> Reduced:
    """Reduce the tokens of a ViT from layer to layer, in place.

    The network is called as before, and its weights keep their names and values. `forward_features` returns fewer
    tokens, and `forward_intermediates` cannot return feature maps.

        >>> import timm, torch
        >>> vit = timm.create_model("test_vit", img_size=160)
        >>> reduced = reduce_tokens(vit, TokenMerging(10))
        >>> vit.forward_features(torch.zeros(1, 3, 160, 160)).shape[1]  # 101 without reduction
        41
        >>> reduced.remove()

    Args:
        model: a VisionTransformer or Eva of timm: plain, with registers, with rotary positions, DeiT, DINOv2 and v3,
            EVA and EVA02.
        reduction: `TokenMerging` or `TokenPruning`.

    Returns:
        An object with `remove()`, which undoes the reduction.

    Raises:
        UsageError: the network's blocks, attention or pooling are not supported, its tokens are already reduced, a
            mechanism is inserted into its blocks, or the rates do not fit. The network is then unchanged.
    """
    kind = type(model).__name__
    if not isinstance(model, (VisionTransformer, Eva)):
        raise UsageError(f"tokens can be reduced in a VisionTransformer or an Eva of timm; this is a {kind}")
    blocks = list(model.blocks)
    for number, block in enumerate(blocks):
        where = f"block {number} of this {kind}"
        if "forward" in vars(block):
            raise UsageError(f"the tokens of {where} are reduced already; call remove() of that reduction first")
        if type(block) not in _PRE_NORM + _POST_NORM:
            raise UsageError(f"tokens cannot be reduced in {where}, a {type(block).__name__}")
        if type(block.attn) not in _ATTENTION:
            raise UsageError(f"tokens cannot be reduced in {where}, whose attention is {type(block.attn).__name__}")
    if reduction.needs_class_token and model.cls_token is None:
        raise UsageError(f"{type(reduction).__name__} needs a class token, and this {kind} has none; use TokenMerging")
    pool = model.attn_pool
    if pool is not None and (type(pool) is not AttentionPoolLatent or pool.pos_embed is not None):
        raise UsageError(f"tokens cannot be reduced where {type(pool).__name__} pools them by position")
    rates = list(reduction.rates(len(blocks)))
    first = next((number for number, rate in enumerate(rates) if rate), len(blocks))
    for number, block in enumerate(blocks[first:], first):
        if any(name.rpartition(".")[2] == "inserted" for name, _ in block.named_modules()):
            raise UsageError(
                f"tokens cannot be reduced in block {first} of this {kind}: the mechanism inserted into block {number} "
                "needs every token of the grid; remove() the insertion first, or reduce tokens only after that block"
            )
    undo: list[Callable[[], object]] = []
    reduced = False
    for block, rate in zip(blocks, rates, strict=True):
        part = _ReducedBlock(block, reduction, rate, model.num_prefix_tokens, follows=reduced)
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


class _ReducedBlock:
    """The forward pass of a block whose tokens are reduced between attention and MLP."""

    def __init__(
        self, block: nn.Module, reduction: TokenReduction, rate: float | None, prefix: int, *, follows: bool
    ) -> None:
        self.block: Any = block  # one of timm's classes, which share no type
        self.reduction, self.rate, self.prefix = reduction, rate, prefix
        self.follows = follows  # whether an earlier block reduces tokens
        self._kept: dict[tuple[str, int], Tensor] = {}

    def keep_query(self, module: nn.Module, args: object, out: Tensor) -> None:
        self._keep("query", out)

    def keep_key(self, module: nn.Module, args: object, out: Tensor) -> None:
        self._keep("key", out)

    def _keep(self, name: str, out: Tensor) -> None:
        if self.rate is not None:
            self._kept[name, _thread()] = out

    def __call__(
        self, x_BNC: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UsageError("a network with reduced tokens accepts no attention mask")
        held = _held(x_BNC, self.prefix, lost=self.follows)
        options = {}
        if held.size_BN is not None:
            options["attn_mask"] = held.size_BN.log()[:, None, None].to(x_BNC.dtype)
        if rope is not None:
            options["rope"] = rope = rope if held.place_Bn is None else _rotations(rope, held.place_Bn)
        block = self.block
        x_BNC = x_BNC + _branch(block, 1, partial(block.attn, **options), x_BNC)
        if self.rate is not None:
            query, key = (self._kept.pop((name, _thread())) for name in ("query", "key"))
            heads = Heads(query, key, rope, block.attn.scale, getattr(block.attn, "rotate_half", False))
            x_BNC, held = self.reduction(x_BNC, held, heads, self.rate)
        x_BNC = x_BNC + _branch(block, 2, block.mlp, x_BNC)
        setattr(x_BNC, _HELD, held)
        return x_BNC


class _Pool:
    """The network's pooling, with each token weighted by the number of patches that it represents."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # VisionTransformer or Eva

    def __call__(self, x_BNC: Tensor, pool_type: str | None = None) -> Tensor:
        model = self.model
        kind = model.global_pool if pool_type is None else pool_type
        if model.attn_pool is None and kind not in ("avg", "avgmax"):
            return type(model).pool(model, x_BNC, pool_type)
        size_BN = _held(x_BNC, model.num_prefix_tokens, lost=True).size_BN
        if size_BN is None:
            return type(model).pool(model, x_BNC, pool_type)
        # Eva, whose attention pooling includes the prefix, has no pool_include_prefix
        prefixed = getattr(model, "pool_include_prefix", model.attn_pool is not None)
        first = 0 if prefixed else model.num_prefix_tokens
        x_BNC, size_BN = x_BNC[:, first:], size_BN[:, first:].to(x_BNC.dtype)
        if model.attn_pool is not None:
            return model.attn_pool(x_BNC, attn_mask=size_BN.log()[:, None, None])
        mean_BC = (x_BNC * (size_BN / size_BN.sum(1, keepdim=True))[..., None]).sum(1)
        return mean_BC if kind == "avg" else 0.5 * (x_BNC.amax(1) + mean_BC)


def _carry(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
    """Copy the `Held` of the tokens from input to output. This is a forward hook of the norm after the blocks."""
    if (held := getattr(args[0], _HELD, None)) is not None:
        setattr(out, _HELD, held)


def _held(x_BNC: Tensor, prefix: int, *, lost: bool) -> Held:
    held = getattr(x_BNC, _HELD, None)
    if held is None and lost:
        raise UsageError(
            "the patches of these tokens are unknown: something replaced the output of a block after tokens were "
            "reduced; call the whole network, without anything inserted after its blocks"
        )
    return Held(prefix) if held is None else held


def _branch(block: nn.Module, number: int, run: Callable[[Tensor], Tensor], x_BNC: Tensor) -> Tensor:
    """Compute the residual branch of a block around its attention (1) or its MLP (2)."""
    norm, drop = getattr(block, f"norm{number}"), getattr(block, f"drop_path{number}")
    if type(block) in _POST_NORM:
        return drop(norm(run(x_BNC)))
    out_BNC = run(norm(x_BNC))
    if type(block) is Block:
        return drop(getattr(block, f"ls{number}")(out_BNC))
    gamma = getattr(block, f"gamma_{number}")
    return drop(out_BNC if gamma is None else gamma * out_BNC)


def _check_length(name: str, each: Sequence[object], count: int) -> None:
    if len(each) != count:
        raise UsageError(f"{name} has {len(each)} entries for {count} blocks; give one number, or one per block")


def _thread() -> int:
    return 0 if torch.compiler.is_compiling() else threading.get_ident()  # get_ident cannot be compiled


def _at_least_single(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _along(index_BK: Tensor, like_BNC: Tensor) -> Tensor:
    return index_BK[..., None].expand(-1, -1, like_BNC.shape[2])


def _places(held: Held, x_BNC: Tensor, patches: int) -> Tensor:
    if held.place_Bn is not None:
        return held.place_Bn
    return torch.arange(patches, device=x_BNC.device).expand(len(x_BNC), -1)


def _rotations(rope: Tensor, place_Bn: Tensor) -> Tensor:
    """Return the rotation of each token, (B, 1 or H, n, 2 D), from the rotations of the patches.

    Args:
        rope: (n, 2 D), (H, n, 2 D) or (B, H, n, 2 D).
        place_Bn: see `Held`; a token without a position gets the identity, sin 0 and cos 1.
    """
    while rope.ndim < 4:
        rope = rope[None]
    rope = rope.expand(len(place_Bn), -1, -1, -1)
    index = place_Bn.clamp(min=0)[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3])
    identity = torch.cat(
        [torch.zeros_like(rope[..., : rope.shape[3] // 2]), torch.ones_like(rope[..., rope.shape[3] // 2 :])], -1
    )
    return torch.where(place_Bn[:, None, :, None] < 0, identity[:, :, :1], rope.gather(2, index))
