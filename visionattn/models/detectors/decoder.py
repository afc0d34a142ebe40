"""The decoder of a query detector: queries attend to each other and to the image, and refine their boxes.

Shapes: B batch, Q queries, C channels, K classes, L maps; boxes are centre, width and height in fractions of the image.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from visionattn.attention import DeformableAttention


class Answer(NamedTuple):
    """The predictions of a layer for its queries: logits (B, Q, K) and boxes (B, Q, 4)."""

    logits: Tensor
    boxes: Tensor


class Decoder(nn.Module):
    """Layers of self-attention, deformable cross-attention and a feed-forward part; each layer refines the boxes.

        position = MLP(sine(box))                                      (DAB-DETR, Liu et al. 2022, 2201.12329, eq. 1)
        box_l = σ(σ⁻¹(box_{l-1}) + MLP_l(query))                       (Zhu et al. 2020, 2010.04159, section 4.3)

    The gradient of a layer's loss flows into the box of the layer before it, but not into earlier boxes (look forward
    twice, DINO, Zhang et al. 2022, 2203.03605, section 3.5). No gradient flows from the attention into the box around
    which it samples.

    Args:
        channels: C.
        num_classes: K.
        levels: L.
        layers: number of layers (default: 3).
        heads, points: heads of the attention, and points that each head samples in each map (default: 8, 4).
        hidden: hidden channels of the feed-forward parts (default: 512).
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        levels: int,
        layers: int = 3,
        heads: int = 8,
        points: int = 4,
        hidden: int = 512,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            DecoderLayer(channels, levels=levels, heads=heads, points=points, hidden=hidden) for _ in range(layers)
        )
        self.position = nn.Sequential(nn.Linear(2 * channels, channels), nn.ReLU(), nn.Linear(channels, channels))
        self.classify = nn.ModuleList(_classifier(channels, num_classes) for _ in range(layers))
        self.move = nn.ModuleList(_mover(channels) for _ in range(layers))

    def forward(
        self,
        query_BQC: Tensor,
        boxes_BQ4: Tensor,
        maps: Sequence[Tensor],
        hidden_QQ: Tensor | None = None,
        spans_L2: Tensor | None = None,
    ) -> list[Answer]:
        """Run the layers.

        Args:
            query_BQC: initial queries.
            boxes_BQ4: initial boxes.
            maps: L maps (B, C, h, w).
            hidden_QQ: mask, True where the query of the row must not attend to the query of the column (default: every
                query attends to all).
            spans_L2: sizes of the maps in fractions of the image, see `DeformableAttention`.

        Returns:
            The predictions of every layer.
        """
        answers = []
        before_BQ4 = boxes_BQ4
        for layer, classify, move in zip(self.layers, self.classify, self.move, strict=True):
            boxes_BQ4 = before_BQ4.detach()
            position_BQC = self.position(sine(boxes_BQ4, query_BQC.shape[2] // 2))
            query_BQC = layer(query_BQC, position_BQC, boxes_BQ4, maps, hidden_QQ, spans_L2)
            delta_BQ4 = move(query_BQC).float()
            answers.append(Answer(classify(query_BQC).float(), (inverse_sigmoid(before_BQ4) + delta_BQ4).sigmoid()))
            before_BQ4 = (inverse_sigmoid(boxes_BQ4) + delta_BQ4).sigmoid()
        return answers


class DecoderLayer(nn.Module):
    """One layer, with a normalisation after each part; see `Decoder`."""

    def __init__(self, channels: int, *, levels: int, heads: int, points: int, hidden: int) -> None:
        super().__init__()
        self.among = nn.MultiheadAttention(channels, heads, batch_first=True)
        self.look = DeformableAttention(channels, levels=levels, heads=heads, points=points)
        self.feed = nn.Sequential(nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels))
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(3))

    def forward(
        self,
        query_BQC: Tensor,
        position_BQC: Tensor,
        boxes_BQ4: Tensor,
        maps: Sequence[Tensor],
        hidden_QQ: Tensor | None,
        spans_L2: Tensor | None,
    ) -> Tensor:
        placed_BQC = query_BQC + position_BQC
        others_BQC, _ = self.among(placed_BQC, placed_BQC, query_BQC, attn_mask=hidden_QQ, need_weights=False)
        query_BQC = self.norms[0](query_BQC + others_BQC)
        query_BQC = self.norms[1](query_BQC + self.look(query_BQC + position_BQC, boxes_BQ4, maps, spans_L2))
        return self.norms[2](query_BQC + self.feed(query_BQC))


def _classifier(channels: int, num_classes: int) -> nn.Module:
    linear = nn.Linear(channels, num_classes)
    nn.init.constant_(linear.bias, -math.log(99))  # initial scores of .01
    return linear


def _mover(channels: int) -> nn.Module:
    hidden, last = nn.Linear(channels, channels), nn.Linear(channels, 4)
    nn.init.zeros_(last.weight)  # boxes do not move at first
    nn.init.zeros_(last.bias)
    return nn.Sequential(hidden, nn.ReLU(), last)


def sine(boxes_BQ4: Tensor, channels: int) -> Tensor:
    """Encode the four numbers of a box by sines and cosines of wavelengths from 1 to 20: → (B, Q, 4 · channels).

    DAB-DETR, Liu et al. 2022, 2201.12329, section 4.4, with temperature 20. `channels` must be even.
    """
    place = torch.arange(channels // 2, device=boxes_BQ4.device, dtype=boxes_BQ4.dtype)
    angle = boxes_BQ4[..., None] * (2 * math.pi / 20 ** (2 * place / channels))
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(2)


def inverse_sigmoid(x: Tensor, eps: float = 1e-4) -> Tensor:
    """Return log(x / (1 − x)), with x clamped to [eps, 1 − eps]."""
    x = x.clamp(eps, 1 - eps)
    return torch.log(x / (1 - x))
