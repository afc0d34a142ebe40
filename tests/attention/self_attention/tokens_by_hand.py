"""References for token merging and pruning: timm's networks with the papers' equations, token by token."""

import functools
import math
from dataclasses import dataclass, field

import pytest
import timm
import torch
from timm.layers import apply_rot_embed_cat

from tests.capture.models import made_once, randomised
from tests.versions import needs

SMALL = {"img_size": (32, 48), "patch_size": 8, "depth": 4, "embed_dim": 24, "num_heads": 2, "num_classes": 5}
NETWORKS = {  # 4 × 6 patches
    "class token": ("vit_tiny_patch16_224", {}),
    "layer scale, registers": ("vit_small_patch14_reg4_dinov2", {}),
    "two class tokens": ("deit_tiny_distilled_patch16_224", {}),
    "mean": ("vit_tiny_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "mean, post-norm": ("vit_tiny_patch16_224", {"block_fn": timm.models.vision_transformer.ResPostBlock}),
    "attention pooling": ("vit_base_patch16_siglip_224", {}),
    "rotary, mean": ("eva02_tiny_patch14_224", {}),
    "rotary, registers": ("vit_small_patch16_dinov3", {}),
    "rotary by layer and head": ("vit_small_patch16_rope_mixed_224", {}),
    "rotary, one key for two heads": (
        "vit_small_patch16_dinov3",
        {"attn_type": "rope", "qkv_fused": False, "num_kv_heads": 1},
    ),
    "post-norm": ("eva_giant_patch14_224", {"use_post_norm": True, "mlp_ratio": 2.0}),
}
NEWER = {
    "rotary by layer and head": needs("timm", "1.0.31", "a mixed rotary embedding in float64"),
    "rotary, one key for two heads": needs("timm", "1.0.31", "the option num_kv_heads"),
}
ALL = [pytest.param(kind, marks=NEWER.get(kind, ())) for kind in NETWORKS]


@made_once
def network(kind="class token", **options):
    name, own = NETWORKS[kind]
    model = randomised(timm.create_model(name, **SMALL | own | options)).double()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.rpartition(".")[2] in ("gamma", "gamma_1", "gamma_2"):  # timm's layer scales start near zero
                parameter.fill_(0.5)
    return model


def images(batch=2, seed=1):
    return torch.randn(batch, 3, 32, 48, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass
class Token:
    """A token: its features, the patches that it represents (the patch of B last), and the patch with its rotation."""

    x: torch.Tensor
    patches: list[int] = field(default_factory=list)
    place: int | None = None

    @property
    def size(self):
        return max(1, len(self.patches))


@dataclass
class Run:
    """For one image, the tokens and the attention (H, N, N) of each block before its reduction, and the logits."""

    tokens: list[list[Token]] = field(default_factory=list)
    attention: list[torch.Tensor] = field(default_factory=list)
    logits: torch.Tensor | None = None


def run(model, image, reduce):
    """Run the network on one image; `reduce(block number, tokens, keys, attention)` returns the reduced tokens."""
    record = Run()
    x = model.patch_embed(image[None])
    embedded = model._pos_embed(x)
    x, ropes = embedded if isinstance(embedded, tuple) else (embedded, None)
    x = model.norm_pre(x)
    prefix = model.num_prefix_tokens
    tokens = [
        Token(x[0, i], [i - prefix] if i >= prefix else [], i - prefix if i >= prefix else None)
        for i in range(x.shape[1])
    ]
    for number, block in enumerate(model.blocks):
        rope = None
        if ropes is not None:
            rope = ropes[number] if getattr(model, "rope_mixed", False) else ropes[None]
        run_attention = functools.partial(attention, block.attn, rope=rope)
        branch, weights, keys = attended(block, tokens, run_attention)
        record.tokens.append(tokens)
        record.attention.append(weights.detach())
        tokens = [Token(t.x + b, t.patches, t.place) for t, b in zip(tokens, branch, strict=True)]
        tokens = reduce(number, tokens, keys, weights)
        tokens = [Token(t.x + fed_forward(block, t.x), t.patches, t.place) for t in tokens]
    # a token of n patches is repeated n times
    repeated = [t.x for t in tokens for _ in range(t.size)]
    record.logits = model.forward_head(model.norm(torch.stack(repeated)[None]))[0]
    return record


def attended(block, tokens, run_attention):
    """Return the output of a block's attention branch, with norm and layer scale; the weights; and the keys."""
    x = torch.stack([t.x for t in tokens])
    if hasattr(block, "ls1") or hasattr(block, "gamma_1"):
        out, weights, keys = run_attention(tokens, block.norm1(x))
        out = block.ls1(out) if hasattr(block, "ls1") else out if block.gamma_1 is None else block.gamma_1 * out
        return out, weights, keys
    out, weights, keys = run_attention(tokens, x)
    return block.norm1(out), weights, keys


def fed_forward(block, x):
    """Return the output of a block's MLP branch, with norm and layer scale."""
    if hasattr(block, "ls2"):
        return block.ls2(block.mlp(block.norm2(x)))
    if hasattr(block, "gamma_2"):
        out = block.mlp(block.norm2(x))
        return out if block.gamma_2 is None else block.gamma_2 * out
    return block.norm2(block.mlp(x))


def attention(attn, tokens, y, *, rope):
    """Compute attention in which a token of size s counts as s tokens (ToMe, eq. 1)."""
    heads, width = attn.num_heads, attn.head_dim
    if getattr(attn, "qkv", None) is None:
        q, k, v = (project(y) for project in (attn.q_proj, attn.k_proj, attn.v_proj))
    else:
        bias = attn.qkv.bias
        if getattr(attn, "q_bias", None) is not None:
            bias = torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
        q, k, v = torch.nn.functional.linear(y, attn.qkv.weight, bias).chunk(3, -1)
    q, k, v = (part.reshape(len(y), -1, width) for part in (q, k, v))
    shared = heads // k.shape[1]  # query heads per key head
    q, k = attn.q_norm(q), attn.k_norm(k)
    keys = [k[i].mean(0) for i in range(len(y))]
    sizes = torch.tensor([token.size for token in tokens], dtype=y.dtype)
    weights, out = [], []
    for h in range(heads):
        rotated_q = torch.stack([rotated(q[i, h], tokens[i], rope, h, attn) for i in range(len(y))])
        rotated_k = torch.stack([rotated(k[i, h // shared], tokens[i], rope, h, attn) for i in range(len(y))])
        rows = []
        for i in range(len(y)):
            numerators = sizes * torch.exp(rotated_k @ rotated_q[i] / math.sqrt(width))
            rows.append(numerators / numerators.sum())
        weights.append(torch.stack(rows))
        out.append(torch.stack([row @ v[:, h // shared] for row in rows]))
    return attn.proj(attn.norm(torch.cat(out, -1))), torch.stack(weights), keys


def rotated(vector, token, rope, head, attn):
    """Apply the rotary embedding of the token's position, if there is one."""
    if rope is None or token.place is None:
        return vector
    embedding = rope[head if len(rope) > 1 else 0, token.place]
    return apply_rot_embed_cat(vector[None], embedding[None], half=getattr(attn, "rotate_half", False))[0]


def merge(model, rates):
    """Merge by bipartite soft matching (ToMe, §3), pair by pair."""
    prefix = model.num_prefix_tokens

    def reduce(number, tokens, keys, weights):
        first, patches, keys = tokens[:prefix], tokens[prefix:], keys[prefix:]
        of_a, of_b = range(0, len(patches), 2), range(1, len(patches), 2)
        edges = []
        for a in of_a:
            most_similar = max(of_b, key=lambda b: cosine(keys[a], keys[b]))
            edges.append((cosine(keys[a], keys[most_similar]), a, most_similar))
        edges = sorted(edges, reverse=True)[: min(rates[number], len(patches) // 2)]
        into = {a: b for _, a, b in edges}
        merged = []
        for b in of_b:
            group = [patches[b], *(patches[a] for a in of_a if into.get(a) == b)]
            size = sum(t.size for t in group)
            x = sum(t.size * t.x for t in group) / size
            merged.append(Token(x, [p for t in reversed(group) for p in t.patches], patches[b].place))
        return [*first, *(patches[a] for a in of_a if a not in into), *merged]

    return reduce


def cosine(a, b):
    return float((a @ b / (a.norm() * b.norm())).detach())


def prune(model, keep, *, fuse=True):
    """Keep the patches with most class attention and fuse all other patches (EViT, §3); `keep` is {block: fraction}."""
    prefix = model.num_prefix_tokens

    def reduce(number, tokens, keys, weights):
        if number not in keep:
            return tokens
        first, patches = tokens[:prefix], tokens[prefix:]
        scores = [
            sum(weights[h, 0, prefix + i] for h in range(len(weights))) / len(weights) for i in range(len(patches))
        ]
        count = math.ceil(keep[number] * len(patches))
        best = sorted(range(len(patches)), key=lambda i: -float(scores[i].detach()))[:count]
        kept = [patches[i] for i in sorted(best)]
        if not fuse or count == len(patches):
            return [*first, *kept]
        return [*first, *kept, Token(sum(scores[i] * patches[i].x for i in range(len(patches)) if i not in best))]

    return reduce
