"""Feature maps at several strides from any timm backbone.

Shapes: B batch, C channels, H rows, W columns; h and w of a map.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.attention import SelfAttention, insert, swap_attention
from visionattn.errors import UsageError
from visionattn.models.backbone import create_backbone
from visionattn.models.classifier import example_image


class FeaturePyramid(nn.Module):
    """Maps of equal channels, one a stride, for a detector to look at.

    Of a backbone with stages, the feature pyramid network (Lin et al. 2017, 1612.03144, section 3): the last map of
    each stride is brought to C channels, and the coarser is added to it, enlarged:

        P_s = conv3×3(M_s),    M_s = conv1×1(C_s) + upsample(M_2s)

    Strides beyond the backbone's come from the coarsest by 3 × 3 convolutions of stride 2 (Lin et al. 2017, 1708.02002,
    section 4). Of a plain backbone, a ViT whose tokens all have one stride, the simple feature pyramid (Li et al. 2022,
    2203.16527, section 3): its last map alone is brought to each stride, by transposed convolutions or max pooling, and
    then convolved 1 × 1 and 3 × 3. Deviations from the papers: group normalisation takes the place of none in the first
    and of layer normalisation in the second.

    Args:
        backbone: name of a timm model.
        strides: of the maps, each twice the one before.
        channels: C, a multiple of 8.
        pretrained, weights, options, attention, attention_at, attention_preserve, self_attention, self_attention_at: of
            the backbone, as `Classifier`.

    Raises:
        UsageError, DataError: as `create_backbone`, `insert` and `swap_attention`; the backbone has no map of such a
            stride, or takes no images of such a size.

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
            raise UsageError(f"timm gives no maps of {backbone} between its ends; choose another backbone")
        image = example_image(options)
        found = self._survey(image)
        own = [stride for stride in self.strides if stride in found]
        self.plain = len(found) == 1
        if not self.plain and (not own or own[0] != self.strides[0]):
            raise UsageError(
                f"{backbone} has maps of strides {', '.join(map(str, found))}, and none of {self.strides[0]}; "
                "choose other strides"
            )
        self.places = [place for stride, (place, _) in found.items() if self.plain or stride in own]
        self.backbone.prune_intermediate_layers(self.places, prune_norm=True)  # type: ignore[operator]
        if self_attention is not None:
            swap_attention(self.backbone, self_attention, at=self_attention_at)
        if attention is not None:
            insert(self.backbone, attention, at=attention_at, preserve=attention_preserve, image=image)
        if self.plain:
            ((stride, (_, width)),) = found.items()
            self.scales = nn.ModuleList(_rescaled(width, channels, stride, goal) for goal in self.strides)
        else:
            self.lateral = nn.ModuleList(nn.Conv2d(found[stride][1], channels, 1) for stride in own)
            self.smooth = nn.ModuleList(_conv3(channels, channels) for _ in own)
            self.beyond = nn.ModuleList(_conv3(channels, channels, stride=2) for _ in self.strides[len(own) :])

    def forward(self, x_BCHW: Tensor) -> list[Tensor]:
        x_BCHW = x_BCHW.contiguous(memory_format=torch.channels_last)  # a third faster on CPUs
        try:
            maps = self.backbone.forward_intermediates(x_BCHW, indices=self.places, intermediates_only=True)  # type: ignore[operator]
        except AssertionError as error:  # as of a ViT, which is made for one size
            raise UsageError(
                f"the {type(self.backbone).__name__} takes no images of {x_BCHW.shape[2]}×{x_BCHW.shape[3]} pixels: "
                f"{error} Give the size of the data in its options, img_size: …, or dynamic_img_size: true"
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
    def _survey(self, image_CHW: Tensor | None) -> dict[int, tuple[int, int]]:
        """stride → (place among timm's intermediate maps, channels) of the last map of that stride."""
        if image_CHW is None:
            image_CHW = torch.zeros(self.backbone.default_cfg["input_size"])  # type: ignore[index, arg-type]
        training = self.backbone.training
        maps = self.backbone.eval().forward_intermediates(image_CHW[None], intermediates_only=True)  # type: ignore[operator]
        self.backbone.train(training)
        # the image's height may be no multiple of the coarsest stride
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
    """From the map of a plain backbone to one of another stride."""
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
            f"maps of stride {goal} cannot be made from patches {patch} pixels wide; strides must be that, halved or "
            "doubled some times"
        )
    return nn.Sequential(*steps, nn.Conv2d(in_chans, channels, 1, bias=False), _conv3(channels, channels))
