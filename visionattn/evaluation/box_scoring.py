"""Score the heatmaps of boxes: does the score of a box depend on the pixels that its heatmap marks?

Shapes: B images in a batch, N boxes of an image, h × w cells of a heatmap, H × W pixels of the input.
"""

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.ops import box_iou

from visionattn.capture import unwrap
from visionattn.errors import DataError, UsageError
from visionattn.evaluation.box_scores import SAME_BOX, score_again
from visionattn.evaluation.faithfulness import deletion_perturbation, insertion_perturbation, perturbation_curve
from visionattn.evaluation.localisation import energy, hit_share, inside
from visionattn.evaluation.scores import Scores
from visionattn.maps import SURE, BoxHeatmaps, BoxMethod, default_box_method, detect

BOX_CONTROLS = ("box", "box centre")
"""Controls of every method: the filled box, and a Gaussian at its centre with a quarter of its sides as σ."""


def score_boxes(
    detector: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    methods: Mapping[str, BoxMethod] | None = None,
    *,
    steps: int = 8,
    max_boxes: int = 5,
    min_score: float = SURE,
    batch_size: int = 32,
    seed: int = 0,
    advance: Callable[[float], None] | None = None,
) -> Scores:
    """Score methods for boxes, and the controls that they must beat, on the same boxes.

    `deletion` and `insertion` follow the score of the box itself: the highest score of a box of the same class that
    overlaps it with an IoU of at least 0.5; 0 if there is no such box. The controls are the filled box, a Gaussian at
    its centre, and a random map on the grid of each method. Values are means over the boxes of an image, and intervals
    are over images.

    Args:
        detector: a detector, as `maps.BoxMethod` takes it; unchanged afterwards.
        batches: dicts with `image` (B, C, H, W), and optionally `boxes` (B tensors (N, 4), xyxy in pixels) and `labels`
            (B tensors (N,)), the annotated objects. With them, only boxes that find an object are scored, and
            `pointing` and `energy` are measured in the annotated box.
        methods: name → method (default: the detector's default method).
        steps: steps of deletion and insertion, ≥ 2.
        max_boxes, min_score: which boxes of each image are scored, as for `maps.BoxMethod`.
        batch_size: perturbed images in one forward pass.
        seed: seed of all random numbers.
        advance: called with the number of images scored since the previous call.

    Returns:
        Scores of the images in which a box is scored.

    Raises:
        UsageError: the model is not a detector, a method does not fit it, a method has the name of a control, or an
            argument is out of range.
        DataError: no box is scored.
    """
    if steps < 2:
        raise UsageError(f"steps must be ≥ 2, got {steps}")
    detector = unwrap(detector)
    methods = {"default": default_box_method(detector)} if methods is None else methods
    if methods.keys() & set(BOX_CONTROLS):
        raise UsageError(f"{' and '.join(BOX_CONTROLS)} are names of controls; rename the method")
    like = next(detector.parameters(), torch.zeros(()))
    controls: dict[str, tuple[str, ...]] = {}
    values: dict[str, dict[str, list[float]]] = {}
    paths: list[str] = []
    images = 0
    for batch in batches:
        images_BCHW = batch["image"].to(like.device, like.dtype)
        explained = {
            name: method(detector, images_BCHW, max_boxes=max_boxes, min_score=min_score)
            for name, method in methods.items()
        }
        for name, of_images in explained.items():
            rows, columns = of_images[0].heatmaps.shape[1:]
            group = (*BOX_CONTROLS, f"random {rows}×{columns}")
            if controls.setdefault(name, group) != group:
                raise UsageError(f"the heatmaps of {name} differ in size; pass images of one size")
        for index, image_CHW in enumerate(images_BCHW):
            boxes = next(iter(explained.values()))[index]
            truth_N4, keep = _truth(batch, index, boxes)
            if not keep:
                if advance:
                    advance(1)
                continue
            maps = {name: found[index].heatmaps for name, found in explained.items()}
            maps |= _controls(boxes, maps, (image_CHW.shape[1], image_CHW.shape[2]), seed + images)
            images += 1
            found = _metrics(detector, image_CHW, boxes, keep, truth_N4, maps, steps, batch_size, seed)
            for name, metrics in found.items():
                for metric, value in metrics.items():
                    values.setdefault(name, {}).setdefault(metric, []).append(value)
            paths += [batch["path"][index]] if "path" in batch else []
            if advance:
                advance(1)
    if not values:
        raise DataError("there is no box to score; lower min_score, or pass other images")
    names = [*controls, *dict.fromkeys(name for group in controls.values() for name in group)]
    return Scores(
        values={
            name: {metric: torch.tensor(column).numpy() for metric, column in values[name].items()} for name in names
        },
        controls=controls,
        failed={},
        accuracy=None,
        paths=tuple(paths),
        seed=seed,
    )


def _truth(batch: Mapping[str, Any], index: int, boxes: BoxHeatmaps) -> tuple[Tensor | None, list[int]]:
    """Return the annotated box of each box, and which boxes to score: all, or those that find an annotated object."""
    if "boxes" not in batch:
        return None, list(range(len(boxes.boxes)))
    true_M4, label_M = batch["boxes"][index].to(boxes.boxes), batch["labels"][index].to(boxes.labels)
    if not len(true_M4) or not len(boxes.boxes):
        return None, []
    overlap_NM = box_iou(boxes.boxes, true_M4) * (boxes.labels[:, None] == label_M)
    best_N, object_N = overlap_NM.max(1)
    return true_M4[object_N], [number for number, best in enumerate(best_N.tolist()) if best >= SAME_BOX]


def _controls(boxes: BoxHeatmaps, maps: Mapping[str, Tensor], size: tuple[int, int], seed: int) -> dict[str, Tensor]:
    """Return the heatmaps of the controls, one for each box."""
    height, width = size
    y_H1 = torch.arange(height, device=boxes.boxes.device)[:, None] + 0.5
    x_W = torch.arange(width, device=boxes.boxes.device) + 0.5
    left, top, right, bottom = boxes.boxes.float()[:, :, None, None].unbind(1)
    across = (x_W - (left + right) / 2) / ((right - left) / 4).clamp(min=1e-3)
    down = (y_H1 - (top + bottom) / 2) / ((bottom - top) / 4).clamp(min=1e-3)
    drawn = {
        "box": inside(boxes.boxes, size).float(),
        "box centre": torch.exp(-(across.square() + down.square()) / 2),
    }
    for map_Nhw in maps.values():
        generator = torch.Generator().manual_seed(seed)
        rows, columns = map_Nhw.shape[1:]
        drawn[f"random {rows}×{columns}"] = torch.rand(map_Nhw.shape, generator=generator).to(map_Nhw.device)
    return drawn


def _metrics(
    detector: nn.Module,
    image_CHW: Tensor,
    boxes: BoxHeatmaps,
    keep: list[int],
    truth_N4: Tensor | None,
    maps: Mapping[str, Tensor],
    steps: int,
    batch_size: int,
    seed: int,
) -> dict[str, dict[str, float]]:
    """Return the metrics of each map, averaged over the boxes of an image that are scored."""
    model, size = _Detections(detector), (image_CHW.shape[1], image_CHW.shape[2])
    sums: dict[str, dict[str, list[float]]] = {name: {} for name in maps}
    for number in keep:
        target = partial(score_again, box_4=boxes.boxes[number], label=int(boxes.labels[number]))
        changes = {
            "deletion": deletion_perturbation(model, image_CHW[None], target=target),
            "insertion": insertion_perturbation(model, image_CHW[None], target=target),
        }
        for name, heatmaps_Nhw in maps.items():
            heat_1hw = heatmaps_Nhw[number : number + 1]
            found = {
                metric: perturbation_curve(model, change, heat_1hw, steps=steps, batch_size=batch_size, seed=seed).auc
                for metric, change in changes.items()
            }
            if truth_N4 is not None:
                object_1HW = inside(truth_N4[number : number + 1], size)
                found |= {"pointing": hit_share(heat_1hw, object_1HW), "energy": energy(heat_1hw, object_1HW)}
            for metric, value in found.items():
                sums[name].setdefault(metric, []).append(float(value))
    return {
        name: {metric: sum(column) / len(column) for metric, column in metrics.items()}
        for name, metrics in sums.items()
    }


class _Detections(nn.Module):
    """A detector that takes a batch, also if it is one of torchvision's, which take lists of images."""

    def __init__(self, detector: nn.Module) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images_BCHW: Tensor) -> list[dict[str, Tensor]]:
        return detect(self.detector, images_BCHW)
