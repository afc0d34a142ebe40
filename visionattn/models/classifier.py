"""A timm backbone as a classifier."""

from typing import Any

from torch import Tensor, nn

from visionattn.models.backbone import create_backbone


class Classifier(nn.Module):
    """Any timm backbone with a head of `num_classes` outputs.

    Args:
        backbone: name of a timm model.
        num_classes: K.
        pretrained: start from the weights that timm names for this model, from the hub.
        weights: start from this file instead (.safetensors or .pth).
        options: further arguments of the timm model, e.g. `{drop_path_rate: 0.1, img_size: 96}`.

    Raises:
        UsageError, DataError: as `create_backbone`.

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
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.backbone = create_backbone(
            backbone, num_classes=num_classes, pretrained=pretrained, weights=weights, **(options or {})
        )

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.backbone(x_BCHW)
