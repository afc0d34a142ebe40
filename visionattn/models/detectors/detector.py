"""What a detector is, for the task that trains it and for the maps that explain it.

Shapes: B batch, N boxes, P places or queries that answer, K classes; boxes xyxy in pixels of the input.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

Detections = dict[str, Tensor]
"""`boxes` (N, 4), `scores` (N,) in [0, 1], `labels` (N,) int64, the highest score first; where the detector knows it
`index` (N,) int64, which of its places or queries each came from. Scores carry gradients where gradients are on."""


class Detector(nn.Module, ABC):
    """Finds objects: an image → boxes with scores and classes."""

    num_classes: int

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> list[Detections]:
        """Detect; at most a hundred boxes an image, cut at its edges."""

    @abstractmethod
    def losses(self, images_BCHW: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the terms of the loss, weighted, so that their sum is to be minimised.

        Args:
            images_BCHW: normalised.
            boxes: (N, 4) of each image.
            labels: (N,) of each image.
        """


def detections(
    scores_BPK: Tensor,
    boxes_BP4: Tensor,
    size: tuple[int, int],
    *,
    iou: float | None,
    lowest: float = 0.01,
    most: int = 100,
    candidates: int = 1000,
) -> list[Detections]:
    """Choose boxes from the scores of places for classes.

    Args:
        scores_BPK: in [0, 1].
        boxes_BP4: a box a place.
        size: (height, width) of the image, where boxes are cut.
        iou: of boxes of one class that overlap more, only the best is kept (non-maximum suppression); None keeps all.
        lowest: score that counts.
        most: boxes an image.
        candidates: best scores that are looked at.
    """
    height, width = size
    limits = boxes_BP4.new_tensor([width, height, width, height])
    boxes_BP4 = torch.minimum(boxes_BP4.clamp(min=0), limits)
    num_classes = scores_BPK.shape[2]
    best_BM, place_BM = scores_BPK.flatten(1).topk(min(candidates, scores_BPK[0].numel()), dim=1)
    found = []
    for best_M, place_M, boxes_P4 in zip(best_BM, place_BM, boxes_BP4, strict=True):
        place_M, best_M = place_M[best_M >= lowest], best_M[best_M >= lowest]
        index_M, label_M = place_M // num_classes, place_M % num_classes
        boxes_M4 = boxes_P4[index_M]
        keep = slice(most) if iou is None else batched_nms(boxes_M4, best_M, label_M, iou)[:most]
        found.append({"boxes": boxes_M4[keep], "scores": best_M[keep], "labels": label_M[keep], "index": index_M[keep]})
    return found


def padded(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes of several images as one tensor: (B, N, 4), labels (B, N), and which are there (B, N)."""
    boxes_BN4 = nn.utils.rnn.pad_sequence(list(boxes), batch_first=True)
    labels_BN = nn.utils.rnn.pad_sequence(list(labels), batch_first=True)
    counts_B = torch.tensor([len(some) for some in labels], device=labels_BN.device)
    there_BN = torch.arange(labels_BN.shape[1], device=labels_BN.device) < counts_B[:, None]
    return boxes_BN4, labels_BN, there_BN
