"""Base classes of the tasks: `Task` sets up the optimizer and checks classes, `ClassificationTask` adds scores.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

import dataclasses
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, Literal, TypedDict

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
from visionattn.errors import DataError, UsageError
from visionattn.models import architectures_in, description_of, remember_arguments
from visionattn.tasks.optimizers import check_rates, check_schedules, make_optimizers

CHECKPOINT_ENTRY: Final = "visionattn"
"""Key of a task's description in a checkpoint."""


class Task(L.LightningModule, ABC):
    """Train a network. `setup` copies `class_names` and `preprocess` from the data module.

    Without a data module that has them, set both before the training: checkpoints hold them, and `visionattn.load` and
    the command line read checkpoints of a plain `L.Trainer` as those of `visionattn fit`.

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
        remember_arguments(self)
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
        check_num_classes(self.network, self.class_names)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["class_names"] = list(self.class_names)
        if CHECKPOINT_ENTRY not in checkpoint:  # `visionattn fit` has described the task by its config
            checkpoint[CHECKPOINT_ENTRY] = self._description()

    def _description(self) -> dict[str, Any]:
        """Return what `visionattn.load` needs of this task, which a plain `L.Trainer` trains."""
        described: dict[str, Any] = {
            "class_names": list(self.class_names),
            "preprocess": dataclasses.asdict(self.preprocess) if self.preprocess else None,
            "architectures": architectures_in(self),
        }
        try:
            described["model"] = description_of(self, leave_out=("optimizer", "lr_scheduler"))
        except DataError as error:
            described["unknown"] = str(error)  # the weights can be used all the same
        return described

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
        if "label" in batch:
            batch["label"] = renumbered(batch["label"], self.label_numbers)
        if "labels" in batch:
            batch["labels"] = [renumbered(labels_N, self.label_numbers) for labels_N in batch["labels"]]
        return batch

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return make_optimizers(
            self, self.optimizer, self.lr_scheduler, lr_interval=self.lr_interval, gamma_lr_factor=self.gamma_lr_factor
        )

    def on_train_start(self) -> None:
        check_schedules(self.trainer)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        check_rates(optimizer, self.trainer.global_step)


def renumbered(labels: Tensor, numbers: Sequence[int]) -> Tensor:
    """Change labels from the data's numbers to the task's numbers.

    Args:
        labels: numbers of classes (N,) int64, or (B, K) of 0 and 1, with a column for each class.
        numbers: for each class of the data, its number in the task.
    """
    numbers_K = torch.tensor(numbers, device=labels.device)
    return numbers_K[labels] if labels.ndim == 1 else labels[:, numbers_K.argsort()]


class Prediction(TypedDict):
    """The result of `predict_step`: paths and class probabilities (B, K)."""

    path: list[str]
    probability: Tensor


class ClassificationTask(Task, ABC):
    """Train a network to classify images.

    In validation and test, the task logs the loss and its `metrics` as `val/…` and `test/…`: by default accuracy (top-1
    over all images), top5, f1 (macro) and calibration_error (expected calibration error, 15 bins, Guo et al. 2017,
    1706.04599). A test also sets `confusion`.

    Args:
        network: (B, C, H, W) → logits (B, K).
        label_smoothing: fraction of the target that is spread evenly over all classes, in [0, 1) (default: 0).
        optimization: arguments of `Task`.

    Raises:
        ValueError: label_smoothing is out of its range.
        UsageError: in `setup`, if the task is for one label in each image and the data has several, or the reverse.
        DataError: in `setup`, if neither the data nor the network gives the number of classes, or if the data has only
            one class.
    """

    multi_label = False
    """Whether an image has any number of labels, instead of exactly one."""

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

    def metrics(self, num_classes: int) -> dict[str, Metric]:
        """Return name → metric of (probabilities (B, K), labels) in validation and test."""
        return {
            "accuracy": MulticlassAccuracy(num_classes, average="micro"),
            "top5": MulticlassAccuracy(num_classes, top_k=min(5, num_classes), average="micro"),
            "f1": MulticlassF1Score(num_classes, average="macro"),
            "calibration_error": MulticlassCalibrationError(num_classes, n_bins=15),
        }

    def probabilities(self, logits_BK: Tensor) -> Tensor:
        """Convert logits to probabilities (B, K)."""
        return logits_BK.softmax(-1)

    def setup(self, stage: str) -> None:
        data = datamodule_of(self.trainer)
        names: Sequence[str] = getattr(data, "class_names", ())
        if getattr(data, "multi_label", self.multi_label) != self.multi_label:
            has, takes = (
                f"{'any number of labels' if many else 'one label'}"
                for many in (not self.multi_label, self.multi_label)
            )
            other = "Classification" if self.multi_label else "MultiLabelClassification"
            raise UsageError(
                f"{type(data).__name__} gives an image {has}, and {type(self).__name__} is for {takes}; set model to "
                f"visionattn.tasks.{other}"
            )
        if len(names) == 1 and not self.multi_label and getattr(self.network, "num_classes", 1) != 1:
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
        self.prepare(data, num_classes)
        # groups would merge metrics that are equal on the first batch, e.g. top-1 and top-5
        scores = MetricCollection(dict(self.metrics(num_classes)), compute_groups=False)
        self.val_scores = scores.clone(prefix="val/")
        self.test_scores = scores.clone(prefix="test/")
        # summed over all processes; Lightning's own mean is wrong if two processes share an odd number of images
        self.val_loss, self.test_loss = MeanMetric(), MeanMetric()
        self.test_confusion = None if self.multi_label else MulticlassConfusionMatrix(num_classes)

    def prepare(self, data: object, num_classes: int) -> None:
        """Prepare the task for its data; called by `setup` with the data module and K."""

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._score(batch, self.val_scores, self.val_loss, "val/loss")

    def test_step(self, batch: Batch, batch_idx: int) -> Tensor:
        logits_BK = self._score(batch, self.test_scores, self.test_loss, "test/loss")
        if self.test_confusion is not None:
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
        if self.test_confusion is not None:
            self.confusion = self.test_confusion.compute()
            self.test_confusion.reset()

    def predict_step(self, batch: Batch, batch_idx: int) -> Prediction:
        return {"path": batch["path"], "probability": self.probabilities(self(batch["image"]))}

    def _score(self, batch: Batch, scores: MetricCollection, loss: MeanMetric, loss_name: str) -> Tensor:
        logits_BK = self(batch["image"])
        labels_B = batch["label"]
        weight = self.loss_weight(labels_B)
        loss.update(torch.where(weight > 0, self.loss(logits_BK, labels_B), 0), weight=weight)
        self.log(loss_name, loss, batch_size=len(labels_B))
        probability_BK = self.probabilities(logits_BK.float())
        for name, score in scores.items():
            _count(score, probability_BK, labels_B)  # torchmetrics would take logits in [0, 1] for probabilities
            self.log_metric(name, score, batch_size=len(labels_B))
        return logits_BK

    def log_metric(self, name: str, metric: Metric, *, batch_size: int) -> None:
        """Log the value of a metric after the epoch; called for each batch."""
        self.log(name, metric, batch_size=batch_size, prog_bar=name == "val/accuracy")


def _count(score: Metric, probability_BK: Tensor, labels: Tensor) -> None:
    """Update a score; an empty batch (of a process without images) only initialises the score's state."""
    if len(labels):
        score.update(probability_BK, labels)
        return
    score.update(probability_BK.new_zeros(1, probability_BK.shape[1]), labels.new_zeros(1, *labels.shape[1:]))
    for name, state in score.metric_state.items():
        setattr(score, name, [part[:0] for part in state] if isinstance(state, list) else torch.zeros_like(state))


def check_num_classes(network: nn.Module, class_names: Sequence[str]) -> None:
    """Check that a network has an output for each class of the data.

    Raises:
        DataError: the network's `num_classes` is another number.
    """
    outputs, count = getattr(network, "num_classes", None), len(class_names)
    if count and outputs not in (None, count):
        raise DataError(
            f"the network has num_classes {outputs}, and the data has {count} classes ({_few(class_names)}); "
            f"set model.init_args.network.init_args.num_classes: {count}"
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", …" if len(names) > 5 else "")


def datamodule_of(trainer: L.Trainer) -> object:
    """Return the data module of a trainer, or None."""
    return trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it on every Trainer
