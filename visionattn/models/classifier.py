"""A timm backbone as a classifier."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.attention import SelfAttention, TokenReduction, insert, reduce_tokens, swap_attention
from visionattn.models.backbone import create_backbone


class Classifier(nn.Module):
    """Any timm backbone with a head of `num_classes` outputs.

    Args:
        backbone: name of a timm model.
        num_classes: K.
        pretrained: start from the weights that timm names for this model, from the hub.
        weights: start from this file instead (.safetensors or .pth).
        options: further arguments of the timm model, e.g. `{drop_path_rate: 0.1, img_size: 96}`.
        attention: makes a mechanism from a number of channels, which is inserted after the weights are loaded; None for
            the backbone as it is.
        attention_at: where, as `insert` takes it: `stages`, `blocks`, `branches`, or names of the backbone's modules.
        attention_preserve: behind gates that start closed, so that the weights keep their accuracy; false for the
            papers' form.
        self_attention: make what takes the place of a ViT's self-attention from a number of heads, with the weights
            kept, e.g. `visionattn.attention.Windowed`; they take turns over the layers. None for the backbone's own.
            Always a list: a parser of types cannot write down what may be one or several.
        self_attention_at: which of the ViT's modules, as `swap_attention` takes them; None for all.
        tokens: merges or prunes tokens from block to block of a ViT, e.g. `visionattn.attention.TokenMerging`; without
            weights, so a checkpoint that was trained without it can be tested with it, and the other way round.

    Raises:
        UsageError, DataError: as `create_backbone`, `insert`, `swap_attention` and `reduce_tokens`.

    Shape: (B, 3, H, W), normalised → logits (B, K).
    """

    def __init__(
        self,
        backbone: str,
        *,
        num_classes: int,
        pretrained: bool = False,
        weights: str | None = None,
        options: dict[str, Any] | None = None,
        attention: Callable[[int], nn.Module] | None = None,
        attention_at: str | Sequence[str] = "stages",
        attention_preserve: bool = True,
        self_attention: list[Callable[[int], SelfAttention]] | None = None,
        self_attention_at: str | list[str] | None = None,
        tokens: TokenReduction | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = create_backbone(
            backbone, num_classes=num_classes, pretrained=pretrained, weights=weights, **(options or {})
        )
        if self_attention is not None:
            swap_attention(self.backbone, self_attention, at=self_attention_at)
        if attention is not None:
            image = example_image(options or {})
            insert(self.backbone, attention, at=attention_at, preserve=attention_preserve, image=image)
        if tokens is not None:
            reduce_tokens(self.backbone, tokens)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.backbone(x_BCHW)


def example_image(options: dict[str, Any]) -> Tensor | None:
    """An image as the options want it; None where they leave it to the model's own configuration."""
    if not {"img_size", "in_chans"} & options.keys():
        return None
    size = options.get("img_size", 224)
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    return torch.zeros(options.get("in_chans", 3), height, width)
