"""Swap the self-attention of a timm ViT for another form, with the same weights.

Shapes: B batch, H heads, N tokens, C channels, D channels of a head.
"""

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any, Literal, NoReturn

import timm.layers
import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visionattn.attention.insertion.inserting import fill_missing
from visionattn.attention.self_attention.dense import SelfAttention
from visionattn.attention.self_attention.output_gate import OutputGate
from visionattn.attention.self_attention.token_reduction import refuse_reduced_tokens
from visionattn.errors import UsageError, nearest

_KNOWN = (timm.layers.Attention, timm.layers.AttentionRope, EvaAttention)
_BIASES = (
    "relative_position_bias_table",
    "rel_pos",
    "rel_pos_bias",
    "rel_pos_h",
    "attention_biases",
    "attention_bias_cache",
)


class SwappedAttention(nn.Module):
    """A self-attention module of timm in which another mechanism combines q, k and v. The weights stay.

    The new module shares all parts of the replaced module: parameters under the same names, norms of queries and keys,
    rotary embeddings, gates, dropout, hooks. The mechanism is an additional child `mechanism`.

    Args:
        attention: timm's module, which is replaced.
        mechanism: combines q, k and v.
        grid: the number of patch rows and columns of the images that the ViT is processing.
        num_prefix_tokens: class and register tokens before the patches.
        gate: see `swap_attention`; the gate is an additional child `output_gate`.

    Shape: (B, N, C) → the same.
    """

    def __init__(
        self,
        attention: nn.Module,
        mechanism: SelfAttention,
        grid: "Grid",
        num_prefix_tokens: int,
        gate: Literal["head", "channel"] | None = None,
    ) -> None:
        super().__init__()
        self.__dict__.update(vars(attention))
        self._modules = {**attention._modules, "mechanism": mechanism}
        if gate is not None:
            own: Any = attention
            weight, channels = own.proj.weight, (own.qkv or own.q_proj).in_features
            made = OutputGate(channels, own.num_heads, weight.shape[1] // own.num_heads, per=gate)
            self._modules["output_gate"] = made.to(weight.device, weight.dtype).train(attention.training)
        self.grid = grid
        self.prefix = num_prefix_tokens

    def forward(
        self, x_BNC: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        own: Any = self  # has the attributes of timm's class, copied in __init__
        if attn_mask is not None or is_causal:
            raise UsageError("swapped attention accepts no mask; give the mask to the mechanism, e.g. BlockSparse")
        q_BHND, k_BHND, v_BHND = self._project(x_BNC)
        q_BHND, k_BHND = own.q_norm(q_BHND), own.k_norm(k_BHND)
        if rope is not None:
            q_BHND, k_BHND = (self._rotate(x, rope).type_as(v_BHND) for x in (q_BHND, k_BHND))
        if getattr(own, "num_kv_groups", 1) > 1:
            k_BHND, v_BHND = (x.repeat_interleave(own.num_kv_groups, 1) for x in (k_BHND, v_BHND))
        out_BHND = own.mechanism(
            q_BHND,
            k_BHND,
            v_BHND,
            grid=self.grid.size,
            num_prefix_tokens=self.prefix,
            dropout_p=own.attn_drop.p if self.training else 0.0,
        )
        if (output_gate := getattr(own, "output_gate", None)) is not None:
            out_BHND = output_gate(out_BHND, x_BNC)
        out_BNX = own.norm(out_BHND.transpose(1, 2).flatten(2))
        if (gate := getattr(own, "gate", None)) is not None:  # timm 1.0.23 has no gates
            out_BNX = out_BNX * gate(x_BNC).sigmoid()
        return own.proj_drop(own.proj(out_BNX))

    def _project(self, x_BNC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own: Any = self
        if own.qkv is None:
            q, k, v = (project(x_BNC) for project in (own.q_proj, own.k_proj, own.v_proj))
        elif getattr(own, "q_bias", None) is not None:
            q, k, v = F.linear(x_BNC, own.qkv.weight, torch.cat([own.q_bias, own.k_bias, own.v_bias])).chunk(3, -1)
        else:
            q, k, v = own.qkv(x_BNC).chunk(3, -1)
        num_kv_heads = getattr(own, "num_kv_heads", own.num_heads)
        heads_of = ((q, own.num_heads), (k, num_kv_heads), (v, num_kv_heads))
        q_BHND, k_BHND, v_BHND = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x, heads in heads_of)
        return q_BHND, k_BHND, v_BHND

    def _rotate(self, x_BHND: Tensor, rope: Tensor) -> Tensor:
        own: Any = self
        prefix, patches = x_BHND[:, :, : own.num_prefix_tokens], x_BHND[:, :, own.num_prefix_tokens :]
        return torch.cat([prefix, apply_rot_embed_cat(patches, rope, half=getattr(own, "rotate_half", False))], 2)


class Grid:
    """The grid of patches of the images that a ViT is processing, read from the ViT's patch embedding."""

    def __init__(self) -> None:
        self._size: tuple[int, int] | None = None

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        if self._size is None:
            raise UsageError(
                "the grid of patches is unknown; call the whole ViT instead of one block with swapped attention"
            )
        return self._size

    def note(self, embedding: Any, args: tuple[Tensor, ...], output: object) -> None:
        """Forward hook of the patch embedding: store the grid of the images."""
        height, width = embedding.dynamic_feat_size(tuple(args[0].shape[-2:]))
        self._size = int(height), int(width)


class Swap:
    """The mechanisms that `swap_attention` put into a model.

    Attributes:
        places: name of a module → the attention that replaces it.
    """

    def __init__(self, model: nn.Module, places: dict[str, SwappedAttention], handles: list[RemovableHandle]) -> None:
        self.places = places
        self._model = model
        self._handles = handles
        self._originals = {name: model.get_submodule(name) for name in places}
        for name, part in places.items():
            _put(model, name, part)

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        return f"Swap({'; '.join(f'{name}: {part.mechanism}' for name, part in self.places.items())})"

    def remove(self) -> None:
        """Restore timm's attention modules; the weights keep their current values. A second call has no effect."""
        for handle in self._handles:
            handle.remove()
        for name, original in self._originals.items():
            original.training = self.places[name].training
            _put(self._model, name, original)
        self._handles, self._originals = [], {}


def swap_attention(
    vit: nn.Module,
    mechanism: Callable[[int], SelfAttention] | Sequence[Callable[[int], SelfAttention]],
    *,
    at: str | Sequence[str] | None = None,
    gate: Literal["head", "channel"] | None = None,
) -> Swap:
    """Swap the mechanism that combines q, k and v in a ViT, in place, and keep the ViT's weights.

    The rest of timm's attention stays: projections, norms of queries and keys, rotary embeddings, gates, dropout.
    Weights of the original ViT still load strictly, and modules and parameters keep their names. Learned weights of a
    mechanism are in the child `mechanism` of the attention. The grid is computed from the images of each call.

        >>> import timm, torch
        >>> from functools import partial
        >>> from visionattn.attention import Windowed
        >>> vit = timm.create_model("test_vit", img_size=160)
        >>> swap = swap_attention(vit, partial(Windowed, window=5))
        >>> vit(torch.zeros(1, 3, 160, 160)).shape
        torch.Size([1, 1000])
        >>> swap.remove()

    Args:
        vit: a ViT of timm with class, register or no prefix tokens, with or without rotary embeddings: ViT, DeiT,
            DINOv2, DINOv3, EVA, EVA-02, CLIP, SigLIP …
        mechanism: makes a mechanism from the number of heads, e.g. `partial(visionattn.attention.Windowed, window=8)`.
            A sequence is used cyclically over the layers, e.g. for windows that are shifted in every second layer.
        at: names of attention modules, in which * stands for one part of a name, e.g. `blocks.*.attn` or
            `["blocks.2.attn"]` (default: all).
        gate: multiply the output of each head (`"head"`), or each channel of each head (`"channel"`), by a learned gate
            that starts at 1, see `OutputGate` (default: no gate). To add only the gate, swap in `Dense`.

    Returns:
        The new attention modules by name; `remove()` undoes the swap.

    Raises:
        UsageError: the model is no ViT of timm, or has no self-attention that can be swapped (a relative-position bias
            is not supported); `at` matches no attention module; the attention is already swapped; or the model's
            tokens are reduced. The model is then unchanged.
    """
    refuse_reduced_tokens(vit)
    kind = type(vit).__name__
    embedding: Any = getattr(vit, "patch_embed", None)
    attentions = {name: module for name, module in vit.named_modules() if type(module) in _KNOWN}
    if at is not None or not attentions:
        attentions = _chosen(vit, ["*"] if at is None else [at] if isinstance(at, str) else at, attentions)
    prefix = getattr(vit, "num_prefix_tokens", None)
    if prefix is None or not hasattr(embedding, "dynamic_feat_size"):
        raise UsageError(
            f"attention can be swapped only in a ViT of timm, whose patch_embed gives the grid; this {kind} is not one"
        )
    factories = [mechanism] if callable(mechanism) else list(mechanism)
    if not factories:
        raise UsageError("mechanism is an empty sequence; give at least one factory")
    grid, places = Grid(), {}
    for number, (name, module) in enumerate(attentions.items()):
        part = factories[number % len(factories)](module.num_heads)
        weight = next(module.parameters())
        part = part.to(weight.device, weight.dtype).train(module.training)
        places[name] = SwappedAttention(module, part, grid, prefix, gate)
    keys = tuple(f"{name}.{child}." for name in places for child in ("mechanism", "output_gate"))
    handles = [
        embedding.register_forward_hook(grid.note),
        vit.register_load_state_dict_pre_hook(partial(fill_missing, keys)),
    ]
    return Swap(vit, places, handles)


def _chosen(vit: nn.Module, patterns: Sequence[str], known: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """Return the attention modules that the patterns name.

    Raises:
        UsageError: a pattern matches no attention module, or only attention that cannot be swapped.
    """
    chosen: list[str] = []
    for pattern in patterns:
        names = _matching(pattern, known)
        if not names:
            _refuse(vit, pattern)
        chosen += names
    return {name: module for name, module in known.items() if name in chosen}  # in the model's order


def _matching(pattern: str, names: Iterable[str]) -> list[str]:
    """Return the names that a pattern matches part by part; the pattern * matches all."""
    parts = pattern.split(".")
    same_depth = (name for name in names if len(name.split(".")) == len(parts))
    fitting = [name for name in same_depth if all(map(fnmatch.fnmatchcase, name.split("."), parts))]
    return list(names) if pattern == "*" else fitting


def _refuse(vit: nn.Module, pattern: str) -> NoReturn:
    kind = type(vit).__name__
    attending = {
        name: module
        for name, module in vit.named_modules()
        if any(word in type(module).__name__.lower() for word in ("attention", "attn"))
    }
    if not attending:
        raise UsageError(f"this {kind} has no self-attention that can be swapped; use a ViT of timm")
    names = _matching(pattern, attending)
    if not names:
        raise UsageError(f"no attention module of this {kind} is named {pattern!r}.{nearest(pattern, attending)}")
    module = attending[names[0]]
    place = f"{names[0]} of this {kind}"
    if isinstance(module, SwappedAttention):
        raise UsageError(f"the attention of {place} is swapped already; call remove() of that swap first")
    place += f" is a {type(module).__name__}"
    if any(getattr(module, bias, None) is not None for bias in _BIASES):
        raise UsageError(f"{place} with a relative-position bias in its logits, which no mechanism supports")
    known = ", ".join(attention.__name__ for attention in _KNOWN)
    raise UsageError(f"{place}; attention that can be swapped: {known} of timm")


def _put(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)
