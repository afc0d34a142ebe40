"""Feature maps at several strides from a timm backbone.

Shapes: B batch, C channels, H rows and W columns of the image, h rows and w columns of a map, s stride.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention import SelfAttention, insert, swap_attention
from visionattn.errors import UsageError
from visionattn.models.backbone import create_backbone
from visionattn.models.classifier import example_image


class _Intermediates(Protocol):
    """The part of a timm model that returns feature maps."""

    default_cfg: Mapping[str, tuple[int, int, int]]

    def forward_intermediates(
        self, x: Tensor, indices: list[int] | None = None, *, intermediates_only: bool
    ) -> list[Tensor]: ...

    def prune_intermediate_layers(self, indices: list[int], prune_norm: bool) -> list[int]: ...


class FeaturePyramid(nn.Module):
    """Feature maps with equal channels, one per stride, for a detector.

    A backbone with stages gets the feature pyramid network (Lin et al. 2017, 1612.03144, section 3): the backbone's
    last map C_s of each stride is projected to C channels, and the next coarser map is upsampled and added:

        P_s = conv3×3(M_s),    M_s = conv1×1(C_s) + upsample(M_2s)

    Maps of larger strides than the backbone's are made from the coarsest P_s by 3 × 3 convolutions of stride 2 (Lin et
    al. 2017, 1708.02002, section 4). A plain backbone, such as a ViT, has maps of a single stride, and gets the simple
    feature pyramid (Li et al. 2022, 2203.16527, section 3): transposed convolutions or max pooling bring the last map
    to each stride, and a 1 × 1 and a 3 × 3 convolution follow. Deviation from the papers: both pyramids have group
    normalisation; in the papers the first has no normalisation, and the second has layer normalisation.

    Args:
        backbone: name of a timm model.
        strides: strides of the maps, each twice the one before (default: 8, 16, 32).
        channels: C, a multiple of 8 (default: 128).
        pretrained, weights, options, attention, attention_at, attention_preserve, self_attention, self_attention_at:
            arguments of the backbone, as for `Classifier`.

    Raises:
        UsageError, DataError: see `create_backbone`, `insert` and `swap_attention`.
        UsageError: strides or channels are out of their range, or the backbone has no map of one of the strides. When
            called: the backbone does not accept the size of the images.

    Shape: (B, 3, H, W) → a list of (B, C, ⌈H/s⌉, ⌈W/s⌉).
    """

    def __init__(
        self,
        backbone: str,
        *,
        strides: Sequence[int] = (8, 16, 32),
        channels: int = 128,
        pretrained: bool = False,
        weights: str | None = None,
        options: dict[str, Any] | None = None,
        attention: Callable[[int], nn.Module] | None = None,
        attention_at: str | Sequence[str] = "stages",
        attention_preserve: bool = True,
        self_attention: list[Callable[[int], SelfAttention]] | None = None,
        self_attention_at: str | list[str] | None = None,
    ) -> None:
        super().__init__()
        if not strides or any(b != 2 * a for a, b in itertools.pairwise(strides)):
            raise UsageError(f"strides must double from one to the next, got {list(strides)}")
        if channels % 8:
            raise UsageError(f"channels must be a multiple of 8, got {channels}")
        self.strides = tuple(strides)
        self.channels = channels
        options = options or {}
        self.backbone = create_backbone(backbone, num_classes=0, pretrained=pretrained, weights=weights, **options)
        if not hasattr(self.backbone, "forward_intermediates"):
            raise UsageError(f"timm gives no intermediate feature maps of {backbone}; choose another backbone")
        image = example_image(options)
        measured = self._measure(image)
        own = [stride for stride in self.strides if stride in measured]
        self.plain = len(measured) == 1
        if not self.plain and (not own or own[0] != self.strides[0]):
            raise UsageError(
                f"{backbone} has maps of strides {', '.join(map(str, measured))}, and none of {self.strides[0]}; "
                "choose other strides"
            )
        self.places = [place for stride, (place, _) in measured.items() if self.plain or stride in own]
        cast(_Intermediates, self.backbone).prune_intermediate_layers(self.places, prune_norm=True)
        if hasattr(self.backbone, "head"):
            self.backbone.head = nn.Identity()  # old releases of timm keep the normalisation in a ConvNeXt's head
        if self_attention is not None:
            swap_attention(self.backbone, self_attention, at=self_attention_at)
        if attention is not None:
            insert(self.backbone, attention, at=attention_at, preserve=attention_preserve, image=image)
        if self.plain:
            ((stride, (_, width)),) = measured.items()
            self.scales = nn.ModuleList(_rescaled(width, channels, stride, goal) for goal in self.strides)
        else:
            self.lateral = nn.ModuleList(nn.Conv2d(measured[stride][1], channels, 1) for stride in own)
            self.smooth = nn.ModuleList(_conv3(channels, channels) for _ in own)
            self.beyond = nn.ModuleList(_conv3(channels, channels, stride=2) for _ in self.strides[len(own) :])

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)  # a third faster on CPUs
        backbone = cast(_Intermediates, self.backbone)
        try:
            maps = backbone.forward_intermediates(x_BCHW, indices=self.places, intermediates_only=True)
        except AssertionError as error:  # e.g. from a ViT that was built for one image size
            raise UsageError(
                f"the {type(self.backbone).__name__} does not accept images of {x_BCHW.shape[2]}×{x_BCHW.shape[3]} "
                f"pixels: {error} Set img_size to this size in the backbone's options, or dynamic_img_size to true"
            ) from error
        if self.plain:
            return [scale(maps[-1]) for scale in self.scales]
        merged: list[Tensor] = []
        for lateral, x in zip(reversed(self.lateral), reversed(maps), strict=True):
            x = lateral(x)
            merged.insert(0, x + F.interpolate(merged[0], size=x.shape[2:]) if merged else x)
        out = [smooth(x) for smooth, x in zip(self.smooth, merged, strict=True)]
        for coarser in self.beyond:
            out.append(coarser(out[-1]))
        return out

    @torch.no_grad()
    def _measure(self, image_CHW: Tensor | None) -> dict[int, tuple[int, int]]:
        """Return stride → (index in timm's intermediate maps, channels) of the last map of each stride."""
        backbone = cast(_Intermediates, self.backbone)
        if image_CHW is None:
            image_CHW = torch.zeros(backbone.default_cfg["input_size"])
        training = self.backbone.training
        self.backbone.eval()
        maps = backbone.forward_intermediates(image_CHW[None], intermediates_only=True)
        self.backbone.train(training)
        # the image's height need not be a multiple of the coarsest stride
        ratios = [image_CHW.shape[1] / x.shape[2] for x in maps]
        strides = [int(ratio) if ratio.is_integer() else 2 ** round(math.log2(ratio)) for ratio in ratios]
        return {stride: (place, x.shape[1]) for place, (stride, x) in enumerate(zip(strides, maps, strict=True))}


def _conv3(in_chans: int, out_chans: int, *, stride: int = 1) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(in_chans, out_chans, 3, stride=stride, padding=1, bias=False),
        nn.GroupNorm(out_chans // 8, out_chans),
        nn.ReLU(),
    )


def _rescaled(in_chans: int, channels: int, stride: int, goal: int) -> nn.Module:
    """Make the layers that turn a plain backbone's map of one stride into a map of another stride."""
    steps: list[nn.Module] = []
    patch = stride
    while stride > goal:
        half = max(channels, in_chans // 2)
        steps += [nn.ConvTranspose2d(in_chans, half, 2, stride=2), nn.GroupNorm(1, half), nn.GELU()]
        in_chans, stride = half, stride // 2
    while stride < goal:
        steps.append(nn.MaxPool2d(2, ceil_mode=True))
        stride *= 2
    if stride != goal:
        raise UsageError(
            f"maps of stride {goal} cannot be made from patches of {patch} pixels; strides must be that number, "
            "multiplied or divided by a power of two"
        )
    return nn.Sequential(*steps, nn.Conv2d(in_chans, channels, 1, bias=False), _conv3(channels, channels))
