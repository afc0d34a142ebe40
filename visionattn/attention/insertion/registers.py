"""A register token for a trained ViT: an extra token that takes over the activation of some neurons.

Shapes: B images, N tokens, C channels, M neurons of a feed-forward layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from visionattn.attention.insertion.swapping import SwappedAttention
from visionattn.attention.self_attention.token_reduction import refuse_reduced_tokens
from visionattn.errors import UsageError


@dataclass(frozen=True)
class TokenPath:
    """Where the tokens of a ViT begin and end.

    Attributes:
        first: the module whose output are the tokens before the first block.
        last: the module whose input are the tokens after the last block.
        linears: name → the last linear layer of each block, in order; its inputs are the neurons of the feed-forward
            layer.
        blocks: name of a linear layer → its block.
        num_prefix_tokens: class and register tokens before the patches.
    """

    first: nn.Module
    last: nn.Module
    linears: dict[str, nn.Linear]
    blocks: dict[str, nn.Module]
    num_prefix_tokens: int


def token_path(model: nn.Module) -> TokenPath:
    """Find the ViT in a model, and the way of its tokens.

    Raises:
        UsageError: the model has no ViT to which a token can be added.
    """
    for name, vit in model.named_modules():
        if isinstance(vit, VisionTransformer):
            first, last, prefix = vit.norm_pre, vit.norm, vit.num_prefix_tokens
        elif isinstance(vit, torchvision.models.VisionTransformer):
            first, last, prefix = vit.encoder.dropout, vit.encoder.ln, 1
        elif type(vit).__name__ in ("ViTModel", "Dinov2Model") and type(vit).__module__.startswith("transformers."):
            first, last, prefix = vit.get_submodule("embeddings"), vit.get_submodule("layernorm"), 1
        else:
            continue
        found = _last_linears(name, vit)
        linears = {own: linear for own, (linear, _) in found.items()}
        blocks = {own: block for own, (_, block) in found.items()}
        return TokenPath(first, last, linears, blocks, prefix)
    raise UsageError(
        f"this {type(model).__name__} has no ViT to which a register can be added: a ViT of timm without rotary "
        "embeddings or windows, of torchvision, or a ViT or DINOv2 of transformers"
    )


def _last_linears(prefix: str, vit: nn.Module) -> dict[str, tuple[nn.Linear, nn.Module]]:
    """Return the last linear layer of each block, by its name in the model, and the block."""
    found: dict[str, tuple[nn.Linear, nn.Module]] = {}
    for list_name, part in vit.named_modules(prefix=prefix):
        if not isinstance(part, (nn.ModuleList, nn.Sequential)):
            continue
        for own, block in part.named_children():
            if not any(name.endswith(("attn", "attention")) for name, _ in block.named_children()):
                continue
            linears = [
                (name, inner)
                for name, inner in block.named_modules(prefix=f"{list_name}.{own}")
                if isinstance(inner, nn.Linear)
            ]
            name, linear = linears[-1]
            found[name] = linear, block
    return found


class RegisterToken:
    """A register in a ViT (Jiang et al. 2025, 2506.08010): a zero token that takes over the activation of neurons.

        a_n(register) = max_i a_n(i),   a_n(i) = 0 for all other tokens i        n in `neurons`

    a_n are the inputs of the last linear layer of a block. The register stands after the class token, attends and is
    attended to like it, and is dropped after the last block. The weights stay, and `remove` restores the model bit by
    bit; as a context manager, at the end of the block. The register is a set of hooks, which copies of the model have
    too.

    Args:
        model: a ViT of timm, torchvision or transformers, or a model that contains one; changed in place.
        neurons: name of a linear layer, the last one of a block → indices of its inputs.

    Raises:
        UsageError: there is no such ViT, layer or neuron, its attention is swapped, its tokens are reduced, or it has a
            register already.
    """

    def __init__(self, model: nn.Module, neurons: Mapping[str, Sequence[int]]) -> None:
        path = token_path(model)
        refuse_reduced_tokens(model)
        if any(isinstance(part, SwappedAttention) for part in model.modules()):
            raise UsageError(
                f"the attention of this {type(model).__name__} is swapped, and has no place for a register"
            )
        if any(isinstance(hook, _Add) for hook in path.first._forward_hooks.values()):
            raise UsageError(f"this {type(model).__name__} has a register already; call remove() of it first")
        for name, indices in neurons.items():
            if name not in path.linears:
                raise UsageError(
                    f"{name!r} is not the last linear layer of a block; these are {', '.join(path.linears)}"
                )
            count = path.linears[name].in_features
            if not all(0 <= index < count for index in indices):
                raise UsageError(f"{name} has the neurons 0 to {count - 1}, got {list(indices)}")
        self.neurons = {name: tuple(indices) for name, indices in neurons.items()}
        place = _Place(path.num_prefix_tokens)
        self._handles: list[RemovableHandle] = [
            path.first.register_forward_hook(_Add(place)),
            path.last.register_forward_pre_hook(_Drop(place)),
        ]
        for name, indices in self.neurons.items():
            self._handles.append(path.linears[name].register_forward_pre_hook(_Move(place.index, indices)))

    def remove(self) -> None:
        """Remove the register. A second call has no effect."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> "RegisterToken":
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"RegisterToken({sum(map(len, self.neurons.values()))} neurons of {', '.join(self.neurons)})"


@dataclass
class _Place:
    """The index of the register among the tokens, and their number with the register."""

    index: int
    count: int = 0


@dataclass(frozen=True)
class _Add:
    """A hook that adds a zero token at a place."""

    place: _Place

    def __call__(self, module: nn.Module, args: object, tokens_BNC: Tensor) -> Tensor:
        before_BPC, after_BNC = tokens_BNC[:, : self.place.index], tokens_BNC[:, self.place.index :]
        self.place.count = tokens_BNC.shape[1] + 1
        return torch.cat([before_BPC, torch.zeros_like(tokens_BNC[:, :1]), after_BNC], 1)


@dataclass(frozen=True)
class _Drop:
    """A hook that drops the token at a place."""

    place: _Place

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        tokens_BNC, index = args[0], self.place.index
        if tokens_BNC.shape[1] != self.place.count:
            raise UsageError("tokens were reduced in a model with a register; remove() the register first")
        return torch.cat([tokens_BNC[:, :index], tokens_BNC[:, index + 1 :]], 1), *args[1:]


@dataclass(frozen=True)
class _Move:
    """A hook that moves the activation of neurons into the register."""

    place: int
    neurons: tuple[int, ...]

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        hidden_BNM: Tensor = args[0]
        moved_BNm = hidden_BNM[..., list(self.neurons)]
        others_BNm = torch.cat([moved_BNm[:, : self.place], moved_BNm[:, self.place + 1 :]], 1)
        hidden_BNM = hidden_BNM.clone()
        hidden_BNM[..., list(self.neurons)] = 0
        hidden_BNM[:, self.place, list(self.neurons)] = others_BNm.amax(1)
        return hidden_BNM, *args[1:]
