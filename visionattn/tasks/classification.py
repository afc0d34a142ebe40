"""Image classification.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from visionattn.attention import mean_span, spans
from visionattn.data import Batch
from visionattn.tasks.base import ClassificationTask
from visionattn.tasks.losses import check_gamma, class_weights_of, focal_cross_entropy


class Classification(ClassificationTask):
    """Train a network to classify images, by cross-entropy.

    The task logs `train/loss`. In validation and test it logs loss, accuracy (top-1 over all images), top5, f1 (macro)
    and calibration_error (expected calibration error, 15 bins, Guo et al. 2017, 1706.04599) as `val/…` and `test/…`. A
    test also sets `confusion`, the confusion matrix. If heads have adaptive spans, the task logs `span/mean` and
    `span/MODULE.HEAD` for each head after every epoch, in patches.

    Args:
        network: (B, C, H, W) → logits (B, K). If it has a `num_classes`, this must equal the data's number of classes.
        class_weights: one weight per class in the loss (default: equal weights); `balanced` weights a class by
            (images / K) / (its images).
        focal_gamma: γ of the focal loss, which gives well-classified images less weight, see
            `losses.focal_cross_entropy` (Lin et al. 2017, 1708.02002); 0 is the cross-entropy (default: 0).
        mixup: alpha of mixup (Zhang et al. 2018, 1710.09412); 0 disables it (default: 0).
        cutmix: alpha of CutMix (Yun et al. 2019, 1905.04899); 0 disables it (default: 0). If both are set, each batch
            uses one of them, drawn at random.
        span_penalty: factor of the mean adaptive span, in patches, in the loss, see `attention.AdaptiveSpan`
            (default: 0).
        optimization: `label_smoothing`, `optimizer`, `lr_scheduler`, `lr_interval` and `gamma_lr_factor`, see
            `ClassificationTask` and `Task`.

    Raises:
        ValueError: an argument is out of its range.
        DataError: in `setup`, if the number of class_weights is wrong, or `balanced` finds no class counts.
    """

    _weight_K: Tensor | None  # noqa: N815 - a shape suffix

    def __init__(
        self,
        network: nn.Module,
        *,
        class_weights: Sequence[float] | Literal["balanced"] | None = None,
        focal_gamma: float = 0.0,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        span_penalty: float = 0.0,
        **optimization: Any,  # the options of ClassificationTask
    ) -> None:
        super().__init__(network, **optimization)
        if min(mixup, cutmix) < 0:
            raise ValueError(f"mixup and cutmix must be ≥ 0, got {mixup} and {cutmix}")
        if span_penalty < 0:
            raise ValueError(f"span_penalty must be ≥ 0, got {span_penalty}")
        check_gamma(focal_gamma)
        self.class_weights = class_weights
        self.focal_gamma = focal_gamma
        self.mixup = mixup
        self.cutmix = cutmix
        self.span_penalty = span_penalty

    def prepare(self, data: object, num_classes: int) -> None:
        self._mixing = self._make_mixing(num_classes)
        weight_K = class_weights_of(
            self.class_weights,
            data,
            num_classes,
            lambda counts_K: counts_K.sum() / (num_classes * counts_K),
            label_numbers=self.label_numbers,
        )
        self.register_buffer("_weight_K", weight_K, persistent=False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        # set only when needed: EMAWeightAveraging warns about every task that defines configure_model
        if self.device_mesh is not None:
            setattr(self, "configure_model", self._spread)  # noqa: B010 - mypy rejects assignments to methods

    def _spread(self) -> None:
        """Shard weights, gradients and optimizer states over processes, for Lightning's ModelParallelStrategy.

        torch's `fully_shard` does the sharding (Zhao et al. 2023, 2304.11277).
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard

        assert self.device_mesh is not None
        if not isinstance(self.network, FSDPModule):  # Lightning calls the method more than once
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images_BCHW, labels = batch["image"], batch["label"]
        if self._mixing is not None:
            images_BCHW, labels = self._mixing(images_BCHW, labels)  # labels become (B, K) probabilities
        loss = self.loss(self(images_BCHW), labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(images_BCHW))
        span = mean_span(self.network) if self.span_penalty else None
        return loss if span is None else loss + self.span_penalty * span

    def on_train_epoch_end(self) -> None:
        for name, spans_H in spans(self.network).items():
            for head, span in enumerate(spans_H.tolist()):
                self.log(f"span/{name}.{head}", span)
        if (mean := mean_span(self.network)) is not None:
            self.log("span/mean", mean.detach(), prog_bar=True)

    def loss(self, logits_BK: Tensor, labels: Tensor) -> Tensor:
        if self.focal_gamma:
            return focal_cross_entropy(
                logits_BK,
                labels,
                gamma=self.focal_gamma,
                weight_K=self._weight_K,
                label_smoothing=self.label_smoothing,
            )
        return F.cross_entropy(logits_BK, labels, weight=self._weight_K, label_smoothing=self.label_smoothing)

    def loss_weight(self, labels_B: Tensor) -> Tensor:
        return super().loss_weight(labels_B) if self._weight_K is None else self._weight_K[labels_B].sum()

    def _make_mixing(self, num_classes: int) -> nn.Module | None:
        mixes = []
        if self.mixup:
            mixes.append(v2.MixUp(num_classes=num_classes, alpha=self.mixup))
        if self.cutmix:
            mixes.append(v2.CutMix(num_classes=num_classes, alpha=self.cutmix))
        return v2.RandomChoice(mixes) if mixes else None
