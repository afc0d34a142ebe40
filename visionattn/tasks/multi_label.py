"""Multi-label classification: any number of labels for each image.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.classification import MultilabelF1Score
from torchmetrics.functional.classification import binary_average_precision
from torchmetrics.utilities import dim_zero_cat

from visionattn.data import Batch
from visionattn.errors import DataError
from visionattn.tasks.base import ClassificationTask
from visionattn.tasks.losses import check_gamma, class_weights_of, focal_binary_cross_entropy


class MultiLabelClassification(ClassificationTask):
    """Train a network to find the labels of an image, by binary cross-entropy for each label.

    The task logs `train/loss`. In validation and test it logs the loss, map (the mean of the labels' average
    precision), `map/LABEL` for each label, and f1 (macro, at `threshold`) as `val/…` and `test/…`. Labels that no image
    of the split has are left out of map.

    Args:
        network: (B, C, H, W) → logits (B, K). If it has a `num_classes`, this must equal the data's number of classes.
            The task sets its attribute `label_threshold`, so that overlays and predictions name all labels above it.
        threshold: probability above which a label counts as found, in (0, 1) (default: 0.5).
        class_weights: one weight per class in the loss, for images that have the label (default: 1); `balanced` weights
            a class by (images without the label) / (images with it).
        focal_gamma: γ of the focal loss, which gives well-classified labels less weight, see
            `losses.focal_binary_cross_entropy` (Lin et al. 2017, 1708.02002); 0 is the binary cross-entropy (default:
            0).
        optimization: `label_smoothing` (moves the targets 0 and 1 towards 0.5), `optimizer`, `lr_scheduler`,
            `lr_interval` and `gamma_lr_factor`, see `ClassificationTask` and `Task`.

    Raises:
        ValueError: an argument is out of its range.
        DataError: in `setup`, if the number of class_weights is wrong, or the data lacks the `class_counts` or the
            `train_count` that `balanced` needs.
    """

    monitor = "val/map"
    multi_label = True
    _weight_K: Tensor | None  # noqa: N815 - a shape suffix

    def __init__(
        self,
        network: nn.Module,
        *,
        threshold: float = 0.5,
        class_weights: Sequence[float] | Literal["balanced"] | None = None,
        focal_gamma: float = 0.0,
        **optimization: Any,  # the options of ClassificationTask
    ) -> None:
        super().__init__(network, **optimization)
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {threshold}")
        check_gamma(focal_gamma)
        self.threshold = threshold
        self.class_weights = class_weights
        self.focal_gamma = focal_gamma
        vars(network)["label_threshold"] = threshold

    def prepare(self, data: object, num_classes: int) -> None:
        count: int | None = getattr(data, "train_count", None)
        if count is None and self.class_weights == "balanced":
            raise DataError(f"class_weights: balanced needs train_count, which {type(data).__name__} does not have")
        weight_K = class_weights_of(
            self.class_weights,
            data,
            num_classes,
            # a label that every image has counts as missing in one, so that its weight is not 0
            lambda counts_K: ((count or 0) - counts_K).clamp(min=1) / counts_K,
            label_numbers=self.label_numbers,
        )
        self.register_buffer("_weight_K", weight_K, persistent=False)

    def metrics(self, num_classes: int) -> dict[str, Metric]:
        return {
            "map": LabelAveragePrecision(),
            "f1": MultilabelF1Score(num_classes, threshold=self.threshold, average="macro"),
        }

    def probabilities(self, logits_BK: Tensor) -> Tensor:
        return logits_BK.sigmoid()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss = self.loss(self(batch["image"]), batch["label"])
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["image"]))
        return loss

    def loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        goal_BK = labels.to(logits_BK.dtype) * (1 - self.label_smoothing) + self.label_smoothing / 2
        return focal_binary_cross_entropy(logits_BK, goal_BK, gamma=self.focal_gamma, positive_weight_K=self._weight_K)

    def log_metric(self, name: str, metric: Metric, *, batch_size: int) -> None:
        if not isinstance(metric, LabelAveragePrecision):  # which is a vector, logged after the epoch
            super().log_metric(name, metric, batch_size=batch_size)

    def on_validation_epoch_end(self) -> None:
        self._log_precision(self.val_scores["map"], "val/map")

    def on_test_epoch_end(self) -> None:
        super().on_test_epoch_end()
        self._log_precision(self.test_scores["map"], "test/map")

    def _log_precision(self, metric: Metric, name: str) -> None:
        precision_K = metric.compute()
        metric.reset()
        # sync_dist silences a warning; the values are already equal in every process
        self.log(name, precision_K.nanmean(), prog_bar=name == "val/map", sync_dist=True)
        names = self.class_names or tuple(map(str, range(len(precision_K))))
        for label, precision in zip(names, precision_K, strict=True):
            if not precision.isnan():
                self.log(f"{name}/{label}", precision, sync_dist=True)


class LabelAveragePrecision(Metric):
    """Average precision of each label, (K,); NaN for a label that no image has.

    torchmetrics' own multi-label metric gives such a label the value 0, with a warning.
    """

    full_state_update = False
    probabilities: list[Tensor]
    labels: list[Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.add_state("probabilities", default=[], dist_reduce_fx="cat")
        self.add_state("labels", default=[], dist_reduce_fx="cat")

    def update(self, probability_BK: Tensor, labels_BK: Tensor) -> None:
        self.probabilities.append(probability_BK)
        self.labels.append(labels_BK.long())

    def compute(self) -> Tensor:
        probability_NK, labels_NK = dim_zero_cat(self.probabilities), dim_zero_cat(self.labels)
        precisions = [
            binary_average_precision(probability_N, labels_N) if labels_N.any() else probability_N.new_tensor(torch.nan)
            for probability_N, labels_N in zip(probability_NK.T, labels_NK.T, strict=True)
        ]
        return torch.stack(precisions)
