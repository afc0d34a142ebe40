"""Base classes of the tasks: `Task` sets up the optimizer and checks classes, `ClassificationTask` adds scores.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

from abc import ABC, abstractmethod
from typing import Any, Literal, TypedDict

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from visionattn.data import Batch, Preprocess
from visionattn.errors import DataError
from visionattn.tasks.optimizers import make_optimizers


class Task(L.LightningModule, ABC):
    """Train a network. `setup` copies `class_names` and `preprocess` from the data module.

    Args:
        network: takes images (B, C, H, W). If it has a `num_classes`, this must equal the data's number of classes.
        optimizer: makes an optimizer from parameters (default: AdamW with a learning rate of 1e-3).
        lr_scheduler: makes a scheduler from an optimizer (default: a constant rate). If `total_steps` of a
            scheduler is unset, as in OneCycleLR, it is set to the number of optimizer steps of the training, and the
            scheduler is updated after every optimizer step.
        lr_interval: when other schedulers are updated (default: epoch).
        gamma_lr_factor: factor on the learning rate of the scales γ of inserted attention, which start at 0
            (default: 10).

    Raises:
        DataError: in `setup`, if `num_classes` differs from the data's number of classes.
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

    def forward(self, images_BCHW: Tensor) -> Any:  # logits or detections, depending on the task's network
        """Run the network on images (B, C, H, W)."""
        return self.network(images_BCHW)

    def setup(self, stage: str) -> None:
        data = datamodule_of(self.trainer)
        self.class_names = tuple(getattr(data, "class_names", ())) or self.class_names
        self.preprocess = getattr(data, "preprocess", None) or self.preprocess
        outputs, count = getattr(self.network, "num_classes", None), len(self.class_names)
        if count and outputs not in (None, count):
            names = ", ".join(self.class_names[:5]) + (", …" if count > 5 else "")
            raise DataError(
                f"the network has num_classes {outputs}, and the data has {count} classes ({names}); "
                f"set model.init_args.network.init_args.num_classes: {count}"
            )

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return make_optimizers(
            self, self.optimizer, self.lr_scheduler, lr_interval=self.lr_interval, gamma_lr_factor=self.gamma_lr_factor
        )


class Prediction(TypedDict):
    """The result of `predict_step`: paths and class probabilities (B, K)."""

    path: list[str]
    probability: Tensor


class ClassificationTask(Task, ABC):
    """Train a network to classify images.

    In validation and test, the task logs loss, accuracy (top-1 over all images), top5, f1 (macro) and calibration_error
    (expected calibration error, 15 bins, Guo et al. 2017, 1706.04599) as `val/…` and `test/…`. A test also sets
    `confusion`.

    Args:
        network: (B, C, H, W) → logits (B, K).
        label_smoothing: fraction of the target that is spread evenly over all classes, in [0, 1) (default: 0).
        optimization: arguments of `Task`.

    Raises:
        ValueError: label_smoothing is out of its range.
        DataError: in `setup`, if neither the data nor the network gives the number of classes.
    """

    confusion: Tensor | None = None
    """Confusion matrix of the last test, (K, K) counts; rows are the true classes, columns the predicted ones."""

    def __init__(self, network: nn.Module, *, label_smoothing: float = 0.0, **optimization: Any) -> None:  # as Task
        super().__init__(network, **optimization)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self._tallies: dict[str, MeanMetric] = {}

    @abstractmethod
    def loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of training and evaluation, given labels (B,) or probabilities (B, K)."""

    def setup(self, stage: str) -> None:
        super().setup(stage)
        num_classes = len(self.class_names) or getattr(self.network, "num_classes", None)
        if num_classes is None:
            raise DataError(
                f"neither the data nor {type(self.network).__name__} gives the number of classes; "
                "give the data class_names or the network a num_classes"
            )
        self.prepare(datamodule_of(self.trainer), num_classes)
        scores = MetricCollection(
            {
                "accuracy": MulticlassAccuracy(num_classes, average="micro"),
                "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
                "f1": MulticlassF1Score(num_classes, average="macro"),
                "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
            },
            compute_groups=False,  # groups would merge metrics equal on the first batch, as top-1 and top-5 may be
        )
        self.val_scores = scores.clone(prefix="val/")
        self.test_scores = scores.clone(prefix="test/")
        # summed over all processes; Lightning's own mean is wrong where two processes share an odd number of images
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    def prepare(self, data: object, num_classes: int) -> None:
        """Prepare the task for its data; called by `setup` with the data module and K."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, self.val_scores, self.val_loss, "val/loss")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits_BK = self._score(batch, self.test_scores, self.test_loss, "test/loss")
        _count(self.test_confusion, logits_BK, batch["label"])
        return logits_BK

    def tally(self, name: str, value_B: Tensor) -> None:
        """Log the mean of a per-image value (B,) over all images of the test, from all batches and processes."""
        mean = self._tallies.setdefault(name, MeanMetric().to(self.device))
        mean.update(value_B.sum() / max(1, len(value_B)), weight=len(value_B))

    def on_test_epoch_end(self) -> None:
        for name, mean in self._tallies.items():
            self.log(name, mean.compute(), sync_dist=True)  # already equal in every process
        self._tallies = {}
        self.confusion = self.test_confusion.compute()
        self.test_confusion.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        return {"path": batch["path"], "probability": self(batch["image"]).softmax(-1)}

    def _score(self, batch: Batch, scores: MetricCollection, loss: MeanMetric, loss_name: str) -> Tensor:
        logits_BK = self(batch["image"])
        labels_B = batch["label"]
        loss.update(self.loss(logits_BK, labels_B) if len(labels_B) else 0.0, weight=len(labels_B))
        self.log(loss_name, loss, batch_size=len(labels_B))
        for name, score in scores.items():
            _count(score, logits_BK, labels_B)
            self.log(name, score, batch_size=len(labels_B), prog_bar=name == "val/accuracy")
        return logits_BK


def _count(score: Metric, logits_BK: Tensor, labels_B: Tensor) -> None:
    """Update a score; an empty batch (of a process without images) initialises the state, but adds nothing to it."""
    if len(labels_B):
        score.update(logits_BK, labels_B)
        return
    score.update(logits_BK.new_zeros(1, logits_BK.shape[1]), labels_B.new_zeros(1))
    for name, state in score.metric_state.items():
        setattr(score, name, [part[:0] for part in state] if isinstance(state, list) else torch.zeros_like(state))


def datamodule_of(trainer: L.Trainer) -> object:
    """Return the data module of a trainer, or None."""
    return trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it on every Trainer
