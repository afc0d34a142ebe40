"""What tasks share: the optimizer and the check of the classes; of those that classify images, the scores.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from visionattn.data.placement import Preprocess
from visionattn.errors import DataError
from visionattn.tasks.optimizers import optimizing


class Task(L.LightningModule, ABC):
    """Train a network. Once it has run, `class_names` and `preprocess` are those of the data.

    Args:
        network: from images (B, C, H, W). Where it has a `num_classes`, that is held against the data.
        optimizer: makes an optimizer from parameters; None is AdamW with a learning rate of 1e-3.
        lr_scheduler: makes a scheduler from an optimizer. One that takes `total_steps` and was given none, as
            OneCycleLR, is told the length of the training and steps with every batch.
        lr_interval: when other schedulers step.
        gamma_lr_factor: how much faster the gates γ of inserted attention learn; they start at 0 and have to open.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        gamma_lr_factor: float = 10.0,
    ) -> None:
        super().__init__()
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.gamma_lr_factor = gamma_lr_factor
        self.class_names: tuple[str, ...] = ()
        self.preprocess: Preprocess | None = None

    def forward(self, images_BCHW: Tensor) -> Any:
        return self.network(images_BCHW)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it on every Trainer
        self.class_names = tuple(getattr(data, "class_names", ())) or self.class_names
        self.preprocess = getattr(data, "preprocess", None) or self.preprocess
        outputs, count = getattr(self.network, "num_classes", None), len(self.class_names)
        if count and outputs not in (None, count):
            names = ", ".join(self.class_names[:5]) + (", …" if count > 5 else "")
            raise DataError(
                f"the network has num_classes {outputs}, and the data has {count} classes ({names}); "
                f"set model.init_args.network.init_args.num_classes: {count}"
            )

    def configure_optimizers(self) -> Any:
        return optimizing(
            self, self.optimizer, self.lr_scheduler, lr_interval=self.lr_interval, gamma_lr_factor=self.gamma_lr_factor
        )


class NamingTask(Task, ABC):
    """Train a network to name what an image shows.

    Logged: `val/…` and `test/…` of loss, accuracy (top-1 over all images), top5, f1 (macro) and calibration_error
    (expected, 15 bins, Guo et al. 2017, 1706.04599). The confusion matrix of the test (rows: truth) stands in
    `confusion` afterwards.

    Args:
        network: (B, C, H, W) → logits (B, K).
        label_smoothing: share of the truth that is spread over all classes, in [0, 1).
        optimization: as `Task`.
    """

    confusion: Tensor | None = None
    """(K, K) counts of the last test, rows the truth."""

    def __init__(self, network: nn.Module, *, label_smoothing: float = 0.0, **optimization: Any) -> None:
        super().__init__(network, **optimization)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self._tallies: dict[str, MeanMetric] = {}

    @abstractmethod
    def loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        """What is minimised, and logged of validation and test; labels (B,) or probabilities (B, K)."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        num_classes = len(self.class_names) or getattr(self.network, "num_classes", None)
        if num_classes is None:
            raise DataError(
                f"neither the data nor {type(self.network).__name__} tells the number of classes; "
                "give the data class_names or the network a num_classes"
            )
        self.prepare(self.trainer.datamodule, num_classes)  # type: ignore[attr-defined]  # Lightning sets it
        scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
                "f1": MulticlassF1Score(num_classes, average="macro"),
                "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
            },
            compute_groups=False,  # it merges metrics that agree on the first batch, as top-1 and top-5 may
        )
        self.val_scores = scores.clone(prefix="val/")
        self.test_scores = scores.clone(prefix="test/")
        # sums over all processes; Lightning's own mean drops halves where an odd number of images falls to two of them
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    def prepare(self, data: Any, num_classes: int) -> None:
        """Called before anything runs, with the data module and K."""

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch, self.val_scores, self.val_loss, "val/loss")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits_BK = self._score(batch, self.test_scores, self.test_loss, "test/loss")
        _count(self.test_confusion, logits_BK, batch["label"])
        return logits_BK

    def tally(self, name: str, value_B: Tensor) -> None:
        """Log the mean of a figure over all test images, whichever batches and processes they fall to."""
        mean = self._tallies.setdefault(name, MeanMetric().to(self.device))
        mean.update(value_B.sum() / max(1, len(value_B)), weight=len(value_B))

    def on_test_epoch_end(self) -> None:
        for name, mean in self._tallies.items():
            self.log(name, mean.compute(), sync_dist=True)  # the same in every process
        self._tallies = {}
        self.confusion = self.test_confusion.compute()
        self.test_confusion.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"path": batch["path"], "probability": self(batch["image"]).softmax(-1)}

    def _score(self, batch: dict[str, Any], scores: MetricCollection, loss: MeanMetric, loss_name: str) -> Tensor:
        logits_BK = self(batch["image"])
        labels_B = batch["label"]
        loss.update(self.loss(logits_BK, labels_B) if len(labels_B) else 0.0, weight=len(labels_B))
        self.log(loss_name, loss, batch_size=len(labels_B))
        for name, score in scores.items():
            _count(score, logits_BK, labels_B)
            self.log(name, score, batch_size=len(labels_B), prog_bar=name == "val/accuracy")
        return logits_BK


def _count(score: Metric, logits_BK: Tensor, labels_B: Tensor) -> None:
    """Update a score; where B is 0, in a process of more than there are images, such that it adds nothing."""
    if len(labels_B):
        score.update(logits_BK, labels_B)
        return
    score.update(logits_BK.new_zeros(1, logits_BK.shape[1]), labels_B.new_zeros(1))
    for name, state in score.metric_state.items():
        setattr(score, name, [part[:0] for part in state] if isinstance(state, list) else torch.zeros_like(state))
