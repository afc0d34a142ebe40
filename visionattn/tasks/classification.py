"""Image classification.

Shapes: B batch, C channels, H rows, W columns, K classes.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms import v2

from visionattn.attention import mean_span, spans
from visionattn.errors import DataError
from visionattn.tasks.base import NamingTask


class Classification(NamingTask):
    """Train a network to name what an image shows, by cross-entropy.

    Logged: `train/loss`; `val/…` and `test/…` of loss, accuracy (top-1 over all images), top5, f1 (macro) and
    calibration_error (expected, 15 bins, Guo et al. 2017, 1706.04599). The confusion matrix of the test (rows: truth)
    stands in `confusion` afterwards. Where heads have adaptive spans: `span/mean`, and `span/MODULE.HEAD` of each, in
    patches, after every epoch.

    Args:
        network: (B, C, H, W) → logits (B, K). Where it has a `num_classes`, that is held against the data.
        class_weights: a weight a class in the loss; `balanced` weighs a class by (images / K) / (its images).
        mixup: alpha of mixup (Zhang et al. 2018, 1710.09412); 0 is off.
        cutmix: alpha of CutMix (Yun et al. 2019, 1905.04899); 0 is off. With both on, each batch draws one of them.
        span_penalty: added to the loss for each patch that heads with adaptive spans reach on average, see
            `attention.AdaptiveSpan`.
        optimization: `label_smoothing`, `optimizer`, `lr_scheduler`, `lr_interval` and `gamma_lr_factor`, as
            `NamingTask` and `Task`.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        class_weights: Sequence[float] | Literal["balanced"] | None = None,
        mixup: float = 0.0,
        cutmix: float = 0.0,
        span_penalty: float = 0.0,
        **optimization: Any,
    ) -> None:
        super().__init__(network, **optimization)
        if min(mixup, cutmix) < 0:
            raise ValueError(f"mixup and cutmix must be ≥ 0, got {mixup} and {cutmix}")
        if span_penalty < 0:
            raise ValueError(f"span_penalty must be ≥ 0, got {span_penalty}")
        self.class_weights = class_weights
        self.mixup = mixup
        self.cutmix = cutmix
        self.span_penalty = span_penalty

    def prepare(self, data: Any, num_classes: int) -> None:
        self._mixing = self._make_mixing(num_classes)
        self.register_buffer("_weight_K", self._make_weights(data, num_classes), persistent=False)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.device_mesh is not None:  # no method for all: EMAWeightAveraging warns of whoever has one
            setattr(self, "configure_model", self._spread)  # noqa: B010 - mypy takes no assignment to a method

    def _spread(self) -> None:
        """Spread weights, gradients and moments over processes, as Lightning's ModelParallelStrategy asks for it.

        By torch's `fully_shard` (Zhao et al. 2023, 2304.11277).
        """
        from torch.distributed.fsdp import FSDPModule, fully_shard

        assert self.device_mesh is not None
        if not isinstance(self.network, FSDPModule):  # Lightning asks again
            fully_shard(self.network, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
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
