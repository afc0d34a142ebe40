"""Object detection.

Shapes: B batch, C channels, H rows, W columns, N boxes of an image, K classes; boxes xyxy in pixels.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from visionattn.data.annotations.boxes import visible
from visionattn.models.detectors.detector import Detections, Detector
from visionattn.tasks.base import Task
from visionattn.tasks.coco_metrics import coco_figures

Seen = list[tuple[Detections, dict[str, Tensor]]]
"""Of each image what was found and what is there, in pixels of its source."""


class Detection(Task):
    """Train a detector to find objects.

    Logged: `train/loss`, and each of its terms as `train/loss_…`; `val/…` and `test/…` of COCO's twelve figures (see
    `FIGURES`), measured in pixels of the source images, and `val/map/<class>`, the average precision of each class.

    Args:
        network: a `Detector`. Its `num_classes` is held against the data.
        sizes: train at these sizes of the longer side, in pixels, one drawn a batch from (seed, step); None trains at
            the size of the data. Multiples of the coarsest stride, 32, are best.
        seed: of the sizes.
        optimization: `optimizer`, `lr_scheduler`, `lr_interval` and `gamma_lr_factor`, as `Task`.
    """

    network: Detector
    monitor = "val/map"
    """What the best checkpoint is best in."""

    def __init__(
        self, network: Detector, *, sizes: Sequence[int] | None = None, seed: int = 0, **optimization: Any
    ) -> None:
        super().__init__(network, **optimization)
        if sizes is not None and (not sizes or min(sizes) < 32):
            raise ValueError(f"sizes must be at least 32 pixels each, got {sizes}")
        self.sizes = sizes
        self.seed = seed
        self._seen: Seen = []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._seen = []

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images_BCHW, boxes = self._resized(batch["image"], batch["boxes"])
        wanted = [~crowd for crowd in batch["crowd"]]
        boxes = [some[keep] for some, keep in zip(boxes, wanted, strict=True)]
        labels = [some[keep] for some, keep in zip(batch["labels"], wanted, strict=True)]
        terms = self.network.losses(images_BCHW, boxes, labels)
        loss = torch.stack(list(terms.values())).sum()
        for name, term in terms.items():
            self.log(f"train/loss_{name}", term, batch_size=len(images_BCHW))
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images_BCHW))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._look(batch)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._look(batch)

    def on_validation_epoch_end(self) -> None:
        self._log("val")

    def on_test_epoch_end(self) -> None:
        self._log("test")

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        found = self._find(batch)
        return {"path": batch["path"], "image_id": batch["image_id"].tolist(), "detections": found}

    def _find(self, batch: dict[str, Any]) -> list[Detections]:
        """Detect, in pixels of the sources; of a batch without an image, as a process may get, nothing."""
        return to_source(self(batch["image"]), batch["placement"]) if len(batch["image"]) else []

    def _look(self, batch: dict[str, Any]) -> None:
        truth = [
            {"boxes": boxes_to_source(boxes, placement), "labels": labels, "iscrowd": crowd.int(), "area": area}
            for boxes, labels, crowd, area, placement in zip(
                batch["boxes"], batch["labels"], batch["crowd"], batch["area"], batch["placement"], strict=True
            )
        ]
        found = [{name: some[name] for name in ("boxes", "scores", "labels")} for some in self._find(batch)]
        self._seen += zip(found, map(_on_cpu, truth), strict=True)

    def _log(self, split: str) -> None:
        seen = gathered(self._seen, self.trainer.world_size)
        self._seen = []
        figures, by_class = coco_figures([found for found, _ in seen], [truth for _, truth in seen])
        everywhere: dict[str, Any] = {"sync_dist": True}  # the same in every process
        for name, value in figures.items():
            shown = name == "map" and split == "val"
            self.log(f"{split}/{name}", self._number(value), prog_bar=shown, **everywhere)
        names = self.class_names or tuple(map(str, range(self.network.num_classes)))
        for label, value in by_class.items():
            self.log(f"{split}/map/{names[label]}", self._number(value), **everywhere)

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
        smooth = {"mode": "bilinear", "antialias": True, "align_corners": False}
        return F.interpolate(images_BCHW, size=(new_h, new_w), **smooth), [some * scale for some in boxes]  # type: ignore[arg-type]


def gathered(seen: Seen, world_size: int) -> Seen:
    """Join what processes have seen of which each took every n-th image, in the data's order; the same in each."""
    if world_size == 1:
        return seen
    parts: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(parts, seen)
    return [one for some in itertools.zip_longest(*parts) for one in some if one is not None]


def to_source(found: Sequence[Detections], placements: Sequence[Any]) -> list[Detections]:
    """Carry detections to the CPU and the pixels of their source images; those in the padding alone are left out."""
    carried = []
    for some, placement in zip(map(_on_cpu, found), placements, strict=True):
        boxes_N4 = boxes_to_source(some["boxes"], placement)
        seen_N = torch.from_numpy(visible(boxes_N4.numpy()))
        carried.append({name: value[seen_N] for name, value in {**some, "boxes": boxes_N4}.items()})
    return carried


def boxes_to_source(boxes_N4: Tensor, placement: Any) -> Tensor:
    """Carry boxes of an input to the CPU and the pixels of its source."""
    return torch.from_numpy(placement.boxes_to_source(boxes_N4.detach().cpu().double().numpy())).float()


def _on_cpu(some: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.cpu() for name, value in some.items()}
