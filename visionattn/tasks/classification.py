"""Image classification.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassCalibrationError,
    MulticlassConfusionMatrix,
    MulticlassF1Score,
)
from torchvision.transforms import v2

from visionattn.errors import DataError
from visionattn.tasks.optimizing import optimizing


class Classification(L.LightningModule):
    """Train a network to name what an image shows, by cross-entropy.

    Logged: `train/loss`; `val/…` and `test/…` of loss, accuracy (top-1 over all images), top5, f1 (macro) and
    calibration_error (expected, 15 bins, Guo et al. 2017, 1706.04599). The confusion matrix of the test (rows: truth)
    stands in `confusion` afterwards.

    Args:
        network: (B, C, H, W) → logits (B, K). Where it has a `num_classes`, that is held against the data.
        optimizer: makes an optimizer from parameters; None is AdamW with a learning rate of 1e-3.
        lr_scheduler: makes a scheduler from an optimizer. One that takes `total_steps` and was given none, as
            OneCycleLR, is told the length of the training and steps with every batch.
        lr_interval: when other schedulers step.
        gamma_lr_factor: how much faster the gates γ of inserted attention learn; they start at 0 and have to open.
        label_smoothing: share of the truth that is spread over all classes, in [0, 1).
        class_weights: a weight a class in the loss; `balanced` weighs a class by (images / K) / (its images).
        mixup: alpha of mixup (Zhang et al. 2018, 1710.09412); 0 is off.
        cutmix: alpha of CutMix (Yun et al. 2019, 1905.04899); 0 is off. With both on, each batch draws one of them.
    """

    confusion: Tensor | None = None
    """(K, K) counts of the last test, rows the truth."""

    def __init__(
        self,
        network: nn.Module,
        *,
        optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        gamma_lr_factor: float = 10.0,
        label_smoothing: float = 0.0,
        class_weights: Sequence[float] | Literal["balanced"] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
    ) -> None:
        super().__init__()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}")
        if min(mixup, cutmix) < 0:
            raise ValueError(f"mixup and cutmix must be ≥ 0, got {mixup} and {cutmix}")
        self.network = network
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.lr_interval = lr_interval
        self.gamma_lr_factor = gamma_lr_factor
        self.label_smoothing = label_smoothing
        self.class_weights = class_weights
        self.mixup = mixup
        self.cutmix = cutmix
        self.class_names: tuple[str, ...] = ()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.network(images_BCHW)

    def setup(self, stage: str) -> None:
        data = self.trainer.datamodule  # type: ignore[attr-defined]  # Lightning sets it on every Trainer
        self.class_names = tuple(getattr(data, "class_names", ())) or self.class_names
        outputs = getattr(self.network, "num_classes", None)
        num_classes = len(self.class_names) or outputs
        if num_classes is None:
            raise DataError(
                f"neither the data nor {type(self.network).__name__} tells the number of classes; "
                "give the data class_names or the network a num_classes"
            )
        if outputs is not None and outputs != num_classes:
            names = ", ".join(self.class_names[:5]) + (", …" if num_classes > 5 else "")
            raise DataError(
                f"the network has num_classes {outputs}, and the data has {num_classes} classes ({names}); "
                f"set model.init_args.network.init_args.num_classes: {num_classes}"
            )
        self._mixing = self._make_mixing(num_classes)
        self.register_buffer("_weight_K", self._make_weights(data, num_classes), persistent=False)
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
        self.test_confusion = MulticlassConfusionMatrix(num_classes)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images_BCHW, labels = batch["image"], batch["label"]
        if self._mixing is not None:
            images_BCHW, labels = self._mixing(images_BCHW, labels)  # labels become (B, K) probabilities
        loss = self._loss(self(images_BCHW), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images_BCHW))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self._score(batch, self.val_scores, "val/loss")

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits_BK = self._score(batch, self.test_scores, "test/loss")
        self.test_confusion.update(logits_BK, batch["label"])
        return logits_BK

    def on_test_epoch_end(self) -> None:
        self.confusion = self.test_confusion.compute()
        self.test_confusion.reset()

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        return {"path": batch["path"], "probability": self(batch["image"]).softmax(-1)}

    def configure_optimizers(self) -> Any:
        return optimizing(
            self,
            self.optimizer,
            self.lr_scheduler,
            lr_interval=self.lr_interval,
            gamma_lr_factor=self.gamma_lr_factor,
        )

    def _score(self, batch: dict[str, Any], scores: MetricCollection, loss_name: str) -> Tensor:
        logits_BK = self(batch["image"])
        labels_B = batch["label"]
        self.log(loss_name, self._loss(logits_BK, labels_B), batch_size=len(labels_B), sync_dist=True)
        scores.update(logits_BK, labels_B)
        for name, score in scores.items():
            self.log(name, score, batch_size=len(labels_B), prog_bar=name == "val/accuracy")
        return logits_BK

    def _loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits_BK, labels, weight=self._weight_K, label_smoothing=self.label_smoothing)  # type: ignore[arg-type]

    def _make_mixing(self, num_classes: int) -> nn.Module | None:
        mixes = []
        if self.mixup:
            mixes.append(v2.MixUp(num_classes=num_classes, alpha=self.mixup))
        if self.cutmix:
            mixes.append(v2.CutMix(num_classes=num_classes, alpha=self.cutmix))
        return v2.RandomChoice(mixes) if mixes else None

    def _make_weights(self, data: Any, num_classes: int) -> Tensor | None:
        if self.class_weights is None:
            return None
        if self.class_weights == "balanced":
            counts = getattr(data, "class_counts", None)
            if counts is None:
                raise DataError(
                    f"class_weights: balanced needs class_counts, which {type(data).__name__} does not have"
                )
            counts_K = torch.as_tensor(counts, dtype=torch.float32)
            return counts_K.sum() / (num_classes * counts_K)
        if len(self.class_weights) != num_classes:
            raise DataError(f"class_weights has {len(self.class_weights)} weights for {num_classes} classes")
        return torch.as_tensor(self.class_weights, dtype=torch.float32)
