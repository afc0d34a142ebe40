"""The attention of the tokens inside a box.

Shapes: N boxes of an image, H × W the input, h × w a map, Q queries, K keys.
"""

import torch
from torch import Tensor, nn

from visionattn.capture import FullAttention, capture
from visionattn.errors import UsageError, nearest
from visionattn.maps.boxes.box_method import BoxMethod, best_boxes, detect


class BoxAttention(BoxMethod):
    """The backbone's attention from the tokens inside a box to all tokens, averaged over these tokens and the heads.

    For detectors with a ViT as backbone, or another backbone with self-attention on a grid.

    Args:
        backbone: name of the backbone inside the detector.
        layer: an attention layer of the backbone: its name, or its index among the attention layers, −1 for the last.
    """

    name = "attention"

    def __init__(self, backbone: str = "features.backbone", layer: int | str = -1) -> None:
        self.backbone = backbone
        self.layer = layer

    def explain(
        self, model: nn.Module, images_BCHW: Tensor, max_boxes: int, min_score: float
    ) -> tuple[list[dict[str, Tensor]], list[Tensor], str]:
        parts = dict(model.named_modules())
        if self.backbone not in parts:
            raise UsageError(f"the detector has no part {self.backbone!r}.{nearest(self.backbone, parts)}")
        detections = [best_boxes(detected, max_boxes, min_score) for detected in detect(model, images_BCHW)]
        try:
            with capture(parts[self.backbone], FullAttention(), layers=[self.layer]) as records:
                parts[self.backbone](images_BCHW)
            record, keys, weights = records.kept()
        except UsageError as error:
            raise UsageError(f"{self.name} needs self-attention in {self.backbone}: {error}; or use odam") from error
        queries = record.queries
        if queries is None or record.windowed or queries.grid != keys.grid:
            raise UsageError(f"{record.name} does not attend from the whole grid to the whole grid; use odam")
        h, w = queries.grid
        size = images_BCHW.shape[2], images_BCHW.shape[3]
        raws = []
        for number, detected in enumerate(detections):
            rows_QK = weights[number, 0].mean(0)  # over heads
            index_Q = queries.index_WN[0].to(rows_QK.device)
            y_Q, x_Q = (index_Q // w + 0.5) * size[0] / h, (index_Q % w + 0.5) * size[1] / w
            raw = []
            for box in detected["boxes"]:
                inside_Q = (index_Q >= 0) & (x_Q >= box[0]) & (x_Q <= box[2]) & (y_Q >= box[1]) & (y_Q <= box[3])
                if not inside_Q.any():  # the box is smaller than a token, so take the nearest token
                    far_Q = (x_Q - (box[0] + box[2]) / 2).square() + (y_Q - (box[1] + box[3]) / 2).square()
                    inside_Q = far_Q == far_Q.masked_fill(index_Q < 0, torch.inf).min()
                raw.append(keys.to_grid(rows_QK[inside_Q].mean(0)[None, None])[0])
            raws.append(torch.stack(raw) if raw else rows_QK.new_zeros(0, h, w))
        return detections, raws, f"attention of {record.name}"
