"""Base classes of the tasks: `Task` sets up the optimizer and checks classes, `ClassificationTask` adds scores.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal, TypedDict

import lightning as L
import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric, Metric, MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)

from visionattn.capture import run
from visionattn.data import Batch, Preprocess, match_classes
from visionattn.errors import DataError
from visionattn.tasks.optimizers import check_rates, check_schedules, make_optimizers


class Task(L.LightningModule, ABC):
    """Train a network. `setup` copies `class_names` and `preprocess` from the data module.

    If the task already has `class_names`, as after `visionattn.load` or an earlier training, the data must have the
    same classes. If the data has them in another order, the labels of its batches are changed to the task's order.
    To train on other classes, first set `class_names = ()`.

    Args:
        network: takes images (B, C, H, W). If it has a `num_classes`, this must equal the data's number of classes.
        optimizer: makes an optimizer from parameters (default: AdamW with a learning rate of 1e-3).
        lr_scheduler: makes a scheduler from an optimizer (default: a constant rate). If `total_steps` of a
            scheduler is unset, as in OneCycleLR, it is set to the number of optimizer steps of the training. Such a
            scheduler is updated after every optimizer step.
        lr_interval: "epoch" or "step": when to update a scheduler whose `total_steps` is set, or that has none
            (default: after every epoch).
        gamma_lr_factor: factor on the learning rate of the scales γ of inserted attention, which start at 0
            (default: 10).

    Raises:
        DataError: in `setup`, if `num_classes` differs from the data's number of classes, or the class names of the
            task and of the data differ.
        UsageError: in training, if a learning rate is negative, or if a schedule ends before the training.
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
        # for each class of the data, its number in `class_names`; None if the order is the same
        self.label_numbers: list[int] | None = None

    def forward(self, images_BCHW: Tensor) -> Any:  # logits or detections, depending on the task's network
        """Run the network on images (B, C, H, W).

        Raises:
            UsageError: the network was made for another image size or another number of channels.
        """
        return run(self.network, images_BCHW)

    def setup(self, stage: str) -> None:
        data = datamodule_of(self.trainer)
        found = tuple(getattr(data, "class_names", ()))
        self.label_numbers = match_classes(self.class_names, found)
        if self.label_numbers is not None:
            if self.trainer.is_global_zero:
                print("the data has the model's classes in another order; they are matched by name", file=sys.stderr)
            # set only when needed: Lightning warns about tasks that define this hook
            setattr(self, "on_after_batch_transfer", self._renumbered)  # noqa: B010 - mypy rejects such assignments
            warnings.filterwarnings("ignore", "You have overridden `on_after_batch_transfer`")
        self.class_names = self.class_names or found
        self.preprocess = getattr(data, "preprocess", None) or self.preprocess
        outputs, count = getattr(self.network, "num_classes", None), len(self.class_names)
        if count and outputs not in (None, count):
            raise DataError(
                f"the network has num_classes {outputs}, and the data has {count} classes ({_few(self.class_names)}); "
                f"set model.init_args.network.init_args.num_classes: {count}"
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = list(self.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trained = tuple(checkpoint.get("class_names", ()))
        if match_classes(trained, self.class_names) is not None:
            raise DataError(
                "the checkpoint has the classes in another order than the data; set task.class_names to "
                f"{_few(trained)}, the checkpoint's order, before you call the trainer"
            )

    def _renumbered(self, batch: Any, dataloader_idx: int) -> Any:  # a batch of any data module
        """Change the labels of a batch from the data's numbers to the task's numbers."""
        if self.label_numbers is None:
            return batch
        numbers_K = torch.tensor(self.label_numbers, device=self.device)
        if "label" in batch:
            batch["label"] = numbers_K[batch["label"]]
        if "labels" in batch:
            batch["labels"] = [numbers_K[labels_N] for labels_N in batch["labels"]]
        return batch

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return make_optimizers(
            self, self.optimizer, self.lr_scheduler, lr_interval=self.lr_interval, gamma_lr_factor=self.gamma_lr_factor
        )

    def on_train_start(self) -> None:
        check_schedules(self.trainer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        check_rates(optimizer, self.trainer.global_step)


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
        DataError: in `setup`, if neither the data nor the network gives the number of classes, or if the data has only
            one class.
    """

    confusion: Tensor | None = None
    """Confusion matrix of the last test, (K, K) counts; rows are the true classes, columns the predicted ones."""

    def __init__(
        self, network: nn.Module, *, label_smoothing: float = 0.0, **optimization: Any
    ) -> None:  # options of Task
        super().__init__(network, **optimization)
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        self.label_smoothing = label_smoothing
        self._tallies: dict[str, MeanMetric] = {}

    @abstractmethod
    def loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of training and evaluation, given labels (B,) or probabilities (B, K)."""

    def loss_weight(self, labels_B: Tensor) -> Tensor:
        """Return the weight of a batch's loss in the mean over all batches; by default the number of images."""
        return torch.tensor(float(len(labels_B)), device=labels_B.device)

    def setup(self, stage: str) -> None:
        names: Sequence[str] = getattr(datamodule_of(self.trainer), "class_names", ())
        if len(names) == 1 and getattr(self.network, "num_classes", 1) != 1:
            raise DataError(
                f"the data has only one class, {names[0]}; if the classes are folders in {names[0]}/, give this folder "
                "as --data.root"
            )
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
            compute_groups=False,  # groups would merge metrics that are equal on the first batch, e.g. top-1 and top-5
        )
        self.val_scores = scores.clone(prefix="val/")
        self.test_scores = scores.clone(prefix="test/")
        # summed over all processes; Lightning's own mean is wrong if two processes share an odd number of images
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
        # sync_dist silences a warning; the values are already equal in every process
        for name, mean in self._tallies.items():
            self.log(name, mean.compute(), sync_dist=True)
        self._tallies = {}
        self.confusion = self.test_confusion.compute()
        self.test_confusion.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        return {"path": batch["path"], "probability": self(batch["image"]).softmax(-1)}

    def _score(self, batch: Batch, scores: MetricCollection, loss: MeanMetric, loss_name: str) -> Tensor:
        logits_BK = self(batch["image"])
        labels_B = batch["label"]
        weight = self.loss_weight(labels_B)
        loss.update(torch.where(weight > 0, self.loss(logits_BK, labels_B), 0), weight=weight)
        self.log(loss_name, loss, batch_size=len(labels_B))
        probability_BK = logits_BK.float().softmax(-1)
        for name, score in scores.items():
            _count(score, probability_BK, labels_B)  # torchmetrics would take logits in [0, 1] for probabilities
            self.log(name, score, batch_size=len(labels_B), prog_bar=name == "val/accuracy")
        return logits_BK


def _count(score: Metric, logits_BK: Tensor, labels_B: Tensor) -> None:
    """Update a score; an empty batch (of a process without images) only initialises the score's state."""
    if len(labels_B):
        score.update(logits_BK, labels_B)
        return
    score.update(logits_BK.new_zeros(1, logits_BK.shape[1]), labels_B.new_zeros(1))
    for name, state in score.metric_state.items():
        setattr(score, name, [part[:0] for part in state] if isinstance(state, list) else torch.zeros_like(state))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def datamodule_of(trainer: L.Trainer) -> object:
    """Return the data module of a trainer, or None."""
    return trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it on every Trainer
