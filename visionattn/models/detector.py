"""The interface of detectors, for the task that trains them and the heatmaps that explain them.

Shapes: B batch, N boxes, P predictions of an image, K classes; boxes xyxy in pixels of the input.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import batched_nms

Detections = dict[str, Tensor]
"""`boxes` (N, 4), `scores` (N,) in [0, 1] and `labels` (N,) int64, sorted by descending score. Some detectors add
`index` (N,) int64: which of the detector's predictions each box is. Scores have gradients if gradients are enabled."""


class Detector(nn.Module, ABC):
    """Base of the detectors: from images to boxes with scores and classes."""

    num_classes: int

    @abstractmethod
    def forward(self, images_BCHW: Tensor) -> list[Detections]:
        """Detect objects in images (B, C, H, W): at most a hundred boxes per image, clipped to the image."""

    @abstractmethod
    def losses(self, images_BCHW: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the weighted terms of the loss; their sum is minimised.

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
    min_score: float = 0.01,
    max_boxes: int = 100,
    candidates: int = 1000,
) -> list[Detections]:
    """Select boxes by their scores.

    Args:
        scores_BPK: in [0, 1].
        boxes_BP4: one box per prediction.
        size: (height, width) of the image; boxes are clipped to it.
        iou: threshold of non-maximum suppression: if two boxes of a class have a larger IoU, only the box with the
            higher score is kept; None keeps all boxes.
        min_score: boxes with a lower score are dropped (default: 0.01).
        max_boxes: maximum number of boxes per image (default: 100).
        candidates: number of best scores that are considered (default: 1,000).
    """
    height, width = size
    limits = boxes_BP4.new_tensor([width, height, width, height])
    boxes_BP4 = torch.minimum(boxes_BP4.clamp(min=0), limits)
    num_classes = scores_BPK.shape[2]
    best_BM, place_BM = scores_BPK.flatten(1).topk(min(candidates, scores_BPK[0].numel()), dim=1)
    selected = []
    for best_M, place_M, boxes_P4 in zip(best_BM, place_BM, boxes_BP4, strict=True):
        place_M, best_M = place_M[best_M >= min_score], best_M[best_M >= min_score]
        index_M, label_M = place_M // num_classes, place_M % num_classes
        boxes_M4 = boxes_P4[index_M]
        keep = slice(max_boxes) if iou is None else batched_nms(boxes_M4, best_M, label_M, iou)[:max_boxes]
        selected.append(
            {"boxes": boxes_M4[keep], "scores": best_M[keep], "labels": label_M[keep], "index": index_M[keep]}
        )
    return selected


def padded(boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Pad the boxes of several images to one tensor: boxes (B, N, 4), labels (B, N), mask of real boxes (B, N)."""
    boxes_BN4 = nn.utils.rnn.pad_sequence(list(boxes), batch_first=True)
    labels_BN = nn.utils.rnn.pad_sequence(list(labels), batch_first=True)
    counts_B = torch.tensor([len(labels_N) for labels_N in labels], device=labels_BN.device)
    there_BN = torch.arange(labels_BN.shape[1], device=labels_BN.device) < counts_B[:, None]
    return boxes_BN4, labels_BN, there_BN
