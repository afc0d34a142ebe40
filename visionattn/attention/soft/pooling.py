"""Attention pooling: a weighted sum over positions.

The weights can serve as a heatmap of the prediction, so that no class-activation method is needed.

Shapes: B batch, C channels, H rows, W columns, K maps.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention.soft.normalisers import Softmax


class DotScore(nn.Module):
    """s_k = q_k · x (Luong et al. 2015, 1508.04025, "dot", with learned queries).

    Args:
        channels: C.
        maps: K.

    Shape: (B, C, H, W) → scores (B, K, H, W). All scores below have the same shape.
    """

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, maps, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.query(x_BCHW)


class ScaledDotScore(nn.Module):
    """s_k = q_k · x / √C (Vaswani et al. 2017, 1706.03762, eq. 1, with learned queries).

    Args:
        channels: C.
        maps: K.
    """

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        self.query = nn.Conv2d(channels, maps, 1, bias=False)
        nn.init.normal_(self.query.weight)  # features of unit variance then give scores of unit variance
        self.scale = channels**-0.5

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.query(x_BCHW) * self.scale


class AdditiveScore(nn.Module):
    """s_k = v_k · tanh(W x + b) (Bahdanau et al. 2015, 1409.0473, app. A.1.2).

    The paper's query is constant here, and b includes it.

    Args:
        channels: C.
        maps: K.
        width: number of hidden channels (default: C / 2, at least 1).
    """

    def __init__(self, channels: int, maps: int, *, width: int | None = None) -> None:
        super().__init__()
        width = _width(channels, width)
        self.hidden = nn.Conv2d(channels, width, 1)
        self.query = nn.Conv2d(width, maps, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.query(self.hidden(x_BCHW).tanh())


class BilinearScore(nn.Module):
    """s_k = mᵀ W_k x (Luong et al. 2015, 1508.04025, "general").

    The query m is the mean of x over positions.

    Args:
        channels: C.
        maps: K; each has C² weights.
    """

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        self.query = nn.Linear(channels, maps * channels, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        query_BKC = self.query(x_BCHW.mean((2, 3))).unflatten(1, (-1, x_BCHW.shape[1]))
        return (query_BKC @ x_BCHW.flatten(2)).unflatten(2, x_BCHW.shape[2:])


class CosineScore(nn.Module):
    """s_k = beta · cos(q_k, x) (Graves et al. 2014, 1410.5401, eq. 5–6); beta is learned and starts at 10.

    Args:
        channels: C.
        maps: K.
    """

    def __init__(self, channels: int, maps: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(maps, channels))
        self.beta = nn.Parameter(torch.tensor(10.0))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        query_KC11 = F.normalize(self.query, dim=1)[:, :, None, None]
        return self.beta * F.conv2d(F.normalize(x_BCHW, dim=1), query_KC11)


class GatedScore(nn.Module):
    """s_k = w_k · (tanh(V x) ⊙ sigmoid(U x)) (Ilse et al. 2018, 1802.04712, eq. 9).

    The paper uses this score for gated multiple-instance pooling.

    Args:
        channels: C.
        maps: K.
        width: number of hidden channels (default: C / 2, at least 1).
    """

    def __init__(self, channels: int, maps: int, *, width: int | None = None) -> None:
        super().__init__()
        width = _width(channels, width)
        self.hidden = nn.Conv2d(channels, 2 * width, 1)
        self.query = nn.Conv2d(width, maps, 1, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        content, gate = self.hidden(x_BCHW).chunk(2, 1)
        return self.query(content.tanh() * gate.sigmoid())


class AttentionPool(nn.Module):
    """Pool features into one vector for each map.

        out_k = sum over positions of p_k x,     p_k = normaliser(score_k(x)) over positions

    Args:
        channels: C.
        maps: K (default: 1).
        score: called as score(C, K), returns a module that computes the scores: a class of this file, or your own
            (default: `DotScore`).
        normaliser: converts scores into weights, (B, K, H, W) → the same (default: `Softmax()`).

    Raises:
        ValueError: maps is < 1.

    Shape: (B, C, H, W) → (B, K, C).
    """

    def __init__(
        self,
        channels: int,
        *,
        maps: int = 1,
        score: Callable[[int, int], nn.Module] = DotScore,
        normaliser: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if maps < 1:
            raise ValueError(f"maps must be ≥ 1, got {maps}")
        self.score = score(channels, maps)
        self.normaliser = normaliser or Softmax()

    def forward(self, x_BCHW: Tensor) -> Tensor:
        weights_BKHW = self.normaliser(self.score(x_BCHW))
        return weights_BKHW.flatten(2) @ x_BCHW.flatten(2).transpose(1, 2)


class AttentionHead(nn.Module):
    """Attention pooling followed by a linear classifier.

        logits = W pool(x) + b                              one map for all classes (default)
        logits_k = w_k · pool_k(x) + b_k                    one map for each class (class_wise=True)

    To use the head after any timm network that gives a feature map:

        body = timm.create_model("resnet18", num_classes=0, global_pool="")
        model = nn.Sequential(body, AttentionHead(body.num_features, 10))

    Args:
        channels: C.
        num_classes: K.
        class_wise: pool each class with its own map (default: False). Map k shows the evidence for class k. If the
            model is trained with a softmax over the classes, map k may also show evidence against class k.
        score, normaliser: see `AttentionPool`.

    Shape: (B, C, H, W) → logits (B, K).
    """

    def __init__(
        self,
        channels: int,
        num_classes: int,
        *,
        class_wise: bool = False,
        score: Callable[[int, int], nn.Module] = DotScore,
        normaliser: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.class_wise = class_wise
        self.pool = AttentionPool(channels, maps=num_classes if class_wise else 1, score=score, normaliser=normaliser)
        self.weight = nn.Parameter(torch.empty(num_classes, channels))
        self.bias = nn.Parameter(torch.zeros(num_classes))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))  # as in nn.Linear

    def forward(self, x_BCHW: Tensor) -> Tensor:
        pooled_BKC = self.pool(x_BCHW)
        if self.class_wise:
            return (pooled_BKC * self.weight).sum(2) + self.bias
        return F.linear(pooled_BKC[:, 0], self.weight, self.bias)


def _width(channels: int, width: int | None) -> int:
    width = max(1, channels // 2) if width is None else width
    if width < 1:
        raise ValueError(f"width must be ≥ 1, got {width}")
    return width
