"""Object detection.

Shapes: B batch, C channels, H rows, W columns, N boxes of an image, K classes; boxes xyxy in pixels.
"""

import itertools
from collections.abc import Sequence
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.data import Batch, Placement, visible
from visionattn.errors import UsageError
from visionattn.models import Detections, Detector
from visionattn.tasks.base import Task
from visionattn.tasks.coco_metrics import compute_coco_metrics

Scored = list[tuple[dict[str, Tensor], dict[str, Tensor]]]
"""For each image, the detections and the ground truth, in pixels of the source image."""


class Prediction(TypedDict):
    """The result of `predict_step`: paths, the image IDs of the data set, and detections in source pixels."""

    path: list[str]
    image_id: list[int]
    detections: list[Detections]


class Detection(Task):
    """Train a detector to find objects.

    In training, the task logs `train/loss`, and each of its terms as `train/loss_…`. In validation and test it logs
    COCO's twelve metrics (see `coco_metrics.METRICS`) as `val/…` and `test/…`, and the average precision of each class
    as `val/map/<class>` and `test/map/<class>`. Boxes are compared in pixels of the source images.

    Args:
        network: a `Detector`. Its `num_classes` must equal the data's number of classes.
        sizes: sizes of the longer side in training, in pixels (default: the size of the data). Each batch is resized to
            one of these sizes, chosen from (seed, step). Use multiples of the coarsest stride, 32.
        seed: random seed for the choice of sizes (default: 0).
        optimization: `optimizer`, `lr_scheduler`, `lr_interval` and `gamma_lr_factor`, see `Task`.

    Raises:
        ValueError: a size is less than 32.
        UsageError: in `setup`, if the trainer's precision would round the boxes, as bf16-true does.
    """

    network: Detector
    monitor = "val/map"
    """The metric that selects the best checkpoint."""

    def __init__(
        self,
        network: Detector,
        *,
        sizes: Sequence[int] | None = None,
        seed: int = 0,
        **optimization: Any,  # the options of Task
    ) -> None:
        super().__init__(network, **optimization)
        if sizes is not None and (not sizes or min(sizes) < 32):
            raise ValueError(f"sizes must be at least 32 pixels each, got {sizes}")
        self.sizes = sizes
        self.seed = seed
        self._scored: Scored = []

    def setup(self, stage: str) -> None:
        precision = self.trainer.precision
        if precision.endswith("-true") and precision != "32-true":
            raise UsageError(
                f"detection cannot run with trainer.precision {precision}, since Lightning would convert the annotated "
                "boxes too; set 32-true, 16-mixed or bf16-mixed"
            )
        super().setup(stage)
        self._scored = []

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images_BCHW, boxes = self._resized(batch["image"], batch["boxes"])
        keep = [~crowd_N for crowd_N in batch["crowd"]]
        boxes = [boxes_N4[keep_N] for boxes_N4, keep_N in zip(boxes, keep, strict=True)]
        labels = [labels_N[keep_N] for labels_N, keep_N in zip(batch["labels"], keep, strict=True)]
        terms = self.network.losses(images_BCHW, boxes, labels)
        loss = torch.stack(list(terms.values())).sum()
        for name, term in terms.items():
            self.log(f"train/loss_{name}", term, batch_size=len(images_BCHW))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images_BCHW))
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._collect(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._collect(batch)

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        return {"path": batch["path"], "image_id": batch["image_id"].tolist(), "detections": self._detect(batch)}

    def _detect(self, batch: Batch) -> list[Detections]:
        """Return detections in pixels of the source images; an empty batch (of a process without images) gives []."""
        return to_source(self(batch["image"]), batch["placement"]) if len(batch["image"]) else []

    def _collect(self, batch: Batch) -> None:
        """Keep detections and truth of a batch until the end of the epoch."""
        truth = [
            {"boxes": boxes_to_source(boxes, placement), "labels": labels, "iscrowd": crowd.int(), "area": area}
            for boxes, labels, crowd, area, placement in zip(
                batch["boxes"], batch["labels"], batch["crowd"], batch["area"], batch["placement"], strict=True
            )
        ]
        detections = [
            {"boxes": image["boxes"], "scores": image["scores"], "labels": image["labels"]}
            for image in self._detect(batch)
        ]
        self._scored += zip(detections, map(_on_cpu, truth), strict=True)

    def _log(self, split: str) -> None:
        scored = gathered(self._scored, self.trainer.world_size)
        self._scored = []
        metrics, by_class = compute_coco_metrics(
            [detections for detections, _ in scored], [truth for _, truth in scored]
        )
        # sync_dist silences a warning; the values are already equal in every process
        for name, value in metrics.items():
            shown = name == "map" and split == "val"
            self.log(f"{split}/{name}", self._number(value), prog_bar=shown, sync_dist=True)
        names = self.class_names or tuple(map(str, range(self.network.num_classes)))
        for label, value in by_class.items():
            self.log(f"{split}/map/{names[label]}", self._number(value), sync_dist=True)

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def _resized(self, images_BCHW: Tensor, boxes: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
        if self.sizes is None:
            return images_BCHW, boxes
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.global_step)
        longer = self.sizes[int(torch.randint(len(self.sizes), (1,), generator=generator))]
        height, width = images_BCHW.shape[2:]
        new_h, new_w = (max(32, round(side * longer / max(height, width))) for side in (height, width))
        scale = images_BCHW.new_tensor([new_w / width, new_h / height, new_w / width, new_h / height])
        images_BCHW = F.interpolate(
            images_BCHW, size=(new_h, new_w), mode="bilinear", antialias=True, align_corners=False
        )
        return images_BCHW, [boxes_N4 * scale for boxes_N4 in boxes]


def gathered(scored: Scored, world_size: int) -> Scored:
    """Gather the images of all processes in the order of the data set; every process gets the same result.

    Each of the n processes holds every n-th image.
    """
    if world_size == 1:
        return scored
    parts: list[Scored] = [[] for _ in range(world_size)]
    torch.distributed.all_gather_object(parts, scored)
    return [image for images in itertools.zip_longest(*parts) for image in images if image is not None]


def to_source(detections: Sequence[Detections], placements: Sequence[Placement]) -> list[Detections]:
    """Move detections to the CPU and convert them to source pixels; boxes entirely in the padding are left out."""
    mapped = []
    for image, placement in zip(map(_on_cpu, detections), placements, strict=True):
        boxes_N4 = boxes_to_source(image["boxes"], placement)
        keep_N = torch.from_numpy(visible(boxes_N4.numpy()))
        mapped.append({name: value[keep_N] for name, value in {**image, "boxes": boxes_N4}.items()})
    return mapped


def boxes_to_source(boxes_N4: Tensor, placement: Placement) -> Tensor:
    """Move (N, 4) xyxy boxes to the CPU and convert them from input pixels to source pixels."""
    return torch.from_numpy(placement.boxes_to_source(boxes_N4.detach().cpu().double().numpy())).float()


def _on_cpu(image: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in image.items()}
