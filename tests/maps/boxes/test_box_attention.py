"""The attention of a box is the mean of rows of timm's unfused attention."""

import pytest
import timm
import torch

from tests.models.detectors.small import batch, dense
from visionattn.maps import BoxAttention

pytestmark = pytest.mark.filterwarnings("ignore:.*heatmaps of:visionattn.errors.MapWarning")


def test_attention_of_a_box_is_the_mean_of_its_tokens_rows():
    torch.manual_seed(0)
    detector = dense(backbone="vit_tiny_patch16_224").eval()
    images, *_ = batch(1)
    (explained,) = BoxAttention()(detector, images, min_score=0.0, max_boxes=5)
    backbone = detector.features.backbone
    attention = backbone.blocks[-1].attn
    attention.fused_attn = False
    rows = []
    attention.attn_drop.register_forward_hook(lambda _, args, out: rows.append(out))
    with torch.no_grad():
        backbone(images)
    for box, raw in zip(explained.boxes.tolist(), explained.raw, strict=True):
        tokens = [
            1 + 4 * row + column
            for row in range(4)
            for column in range(4)
            if box[0] <= 16 * column + 8 <= box[2] and box[1] <= 16 * row + 8 <= box[3]
        ]
        if tokens:
            expected = rows[0][0].mean(0)[tokens].mean(0)[1:].view(4, 4)
            torch.testing.assert_close(raw, expected)
    assert isinstance(backbone, timm.models.VisionTransformer)
