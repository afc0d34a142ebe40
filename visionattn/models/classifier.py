"""A named backbone as a classifier, with optional attention and token reduction."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from visionattn.attention import RegisterToken, SelfAttention, TokenReduction, insert, reduce_tokens, swap_attention
from visionattn.errors import UsageError
from visionattn.models.architectures import remember_arguments
from visionattn.models.resolve import create_network


class Classifier(nn.Module):
    """A backbone of timm, torchvision or transformers with a head of `num_classes` outputs.

    Args:
        backbone: name of a model: of timm (`resnet50`, `hf-hub:OWNER/NAME`, `local-dir:FOLDER`), of torchvision
            (`torchvision:resnet50`, `torchvision:resnet50/IMAGENET1K_V1`) or of transformers (`hf:OWNER/NAME`,
            `hf:FOLDER`).
        num_classes: K.
        pretrained: load the model's default weights from the hub (default: False).
        weights: file of weights to load instead (.safetensors, its index, or a file of torch).
        new_head: do not load the head from `weights`; it starts at random (default: False).
        options: further arguments of the model, e.g. `{drop_path_rate: 0.1, img_size: 96}`.
        attention: function that makes a mechanism from a number of channels; the mechanisms are inserted after the
            weights are loaded (default: no insertion).
        attention_at: places for `insert`: `stages`, `blocks`, `branches`, or names of the backbone's modules (default:
            stages).
        attention_preserve: insert each mechanism with a learned scale γ that starts at 0, so that the pretrained
            accuracy is kept (default); False inserts the mechanism as in its paper, without γ.
        self_attention: list of functions that make a mechanism from a number of heads, e.g.
            `visionattn.attention.Windowed`. They replace a ViT's self-attention but keep its weights; the layers use
            the functions in turn (default: no replacement).
        self_attention_at: names of the ViT's attention modules for `swap_attention` (default: all).
        self_attention_gate: `head` or `channel`, see `swap_attention`; needs `self_attention` (default: no gate).
        tokens: token reduction that merges or prunes tokens from block to block of a ViT, e.g.
            `visionattn.attention.TokenMerging` (default: no reduction). A reduction has no weights, so a model can be
            trained with one and tested without, or the reverse.
        registers: neurons of a ViT whose activation moves into an extra token, see `RegisterToken`: name of a linear
            layer of the backbone → indices, as `maps.add_registers` finds them (default: no register).

    Raises:
        UsageError, DataError: see `create_network`, `insert`, `swap_attention`, `reduce_tokens` and `RegisterToken`.

    Shape: (B, 3, H, W), normalised → logits (B, K).
    """

    def __init__(
        self,
        backbone: str,
        *,
        num_classes: int,
        pretrained: bool = False,
        weights: str | None = None,
        new_head: bool = False,
        options: dict[str, Any] | None = None,
        attention: Callable[[int], nn.Module] | None = None,
        attention_at: str | Sequence[str] = "stages",
        attention_preserve: bool = True,
        self_attention: list[Callable[[int], SelfAttention]] | None = None,  # jsonargparse cannot parse "one or a list"
        self_attention_at: str | list[str] | None = None,
        self_attention_gate: Literal["head", "channel"] | None = None,
        tokens: TokenReduction | None = None,
        registers: dict[str, list[int]] | None = None,
    ) -> None:
        super().__init__()
        remember_arguments(self)
        self.num_classes = num_classes
        self.backbone = create_network(
            backbone,
            num_classes=num_classes,
            pretrained=pretrained,
            weights=weights,
            new_head=new_head,
            **(options or {}),
        )
        if self_attention is not None:
            swap_attention(self.backbone, self_attention, at=self_attention_at, gate=self_attention_gate)
        elif self_attention_gate is not None:
            raise UsageError("self_attention_gate needs self_attention, e.g. visionattn.attention.Dense")
        if attention is not None:
            image = example_image(options or {})
            insert(self.backbone, attention, at=attention_at, preserve=attention_preserve, image=image)
        if tokens is not None:
            reduce_tokens(self.backbone, tokens)
        if registers is not None:
            RegisterToken(self.backbone, registers)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.backbone(x_BCHW)


def example_image(options: Mapping[str, Any]) -> Tensor | None:
    """Return an image of the size and channels in a timm model's options, or None if the options leave both open."""
    if not {"img_size", "in_chans"} & options.keys():
        return None
    size = options.get("img_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.zeros(options.get("in_chans", 3), height, width)
