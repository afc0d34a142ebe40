"""Encoders: from the patches of a glimpse, or from the whole image, to features.

Shapes: N patches, B images, C channels, H × W image, h × w patch.
"""

from abc import ABC
from collections.abc import Callable, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.models.backbone import create_backbone


class Encoder(nn.Module, ABC):
    """Base of the encoders: (N, C, h, w) → (N, out_features)."""

    out_features: int


class MLPEncoder(Encoder):
    """One hidden layer, relu(Linear(patches)), as in Mnih et al. 2014 (1406.6247, section 4).

    Args:
        in_chans: C.
        patch_size: (h, w).
        features: size of the hidden layer (default: 128).
    """

    def __init__(self, in_chans: int, patch_size: tuple[int, int], *, features: int = 128) -> None:
        super().__init__()
        self.out_features = features
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(in_chans * patch_size[0] * patch_size[1], features), nn.ReLU()
        )

    def forward(self, x_NChw: Tensor) -> Tensor:
        return self.layers(x_NChw)


class ConvEncoder(Encoder):
    """3 × 3 convolutions with ReLU, all but the first of stride 2, then flattened.

    Args:
        in_chans: C.
        patch_size: (h, w).
        widths: channels of each convolution (default: 16, 32).
    """

    def __init__(self, in_chans: int, patch_size: tuple[int, int], *, widths: Sequence[int] = (16, 32)) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        height, width = patch_size
        for place, chans in enumerate(widths):
            stride = 2 if place else 1
            layers += [nn.Conv2d(in_chans, chans, 3, stride=stride, padding=1), nn.ReLU()]
            in_chans, height, width = chans, -(-height // stride), -(-width // stride)
        self.out_features = in_chans * height * width
        self.layers = nn.Sequential(*layers, nn.Flatten())

    def forward(self, x_NChw: Tensor) -> Tensor:
        return self.layers(x_NChw)


class TimmEncoder(Encoder):
    """A timm model without its head, for colour photographs.

    Args:
        in_chans: C, e.g. 3 scales of 3 channels; timm repeats the weights of a pretrained first convolution to fit.
        patch_size: (h, w); unused by convolutional models.
        backbone: name of the model.
        pretrained, weights, options: see `models.Classifier`.
    """

    def __init__(
        self,
        in_chans: int,
        patch_size: tuple[int, int],
        *,
        backbone: str,
        pretrained: bool = False,
        weights: str | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = create_backbone(
            backbone, num_classes=0, pretrained=pretrained, weights=weights, in_chans=in_chans, **(options or {})
        )
        self.out_features = int(self.backbone.num_features)  # type: ignore[arg-type]  # an int in every timm model

    def forward(self, x_NChw: Tensor) -> Tensor:
        return self.backbone(x_NChw)


class Glance(Encoder):
    """The whole image, reduced to a low resolution by area averaging, followed by an encoder.

    Args:
        in_chans: C.
        size: (h, w) of the reduced image, or one number for both (default: 12).
        encoder: function that makes the encoder from (C, (h, w)) (default: `ConvEncoder`).
    """

    def __init__(
        self,
        in_chans: int,
        *,
        size: int | tuple[int, int] = 12,
        encoder: Callable[[int, tuple[int, int]], Encoder] = ConvEncoder,
    ) -> None:
        super().__init__()
        self.size = (size, size) if isinstance(size, int) else size
        self.encoder = encoder(in_chans, self.size)
        self.out_features = self.encoder.out_features

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.encoder(F.interpolate(x_BCHW, self.size, mode="area"))
