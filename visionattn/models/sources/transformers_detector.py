"""Detectors of Hugging Face transformers, from the hub or from a folder, as a `Detector`.

Shapes: B batch, N boxes, Q queries, K classes; boxes xyxy in pixels of the input.
"""

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from visionattn.errors import DataError, UsageError, first_line
from visionattn.models.architectures import remember_architecture
from visionattn.models.detector import Detections, Detector, detections
from visionattn.models.sources.transformers_source import (
    architecture_of,
    import_transformers,
    load_pretrained,
    quiet,
    read_config,
    source_of,
)
from visionattn.models.weights import load_state, read_state, require_weights


class TransformersDetector(Detector):
    """A detector of transformers whose output has `logits` (B, Q, K or K + 1) and `pred_boxes` (B, Q, 4).

    Detections are those of the model's own image processor: with K logits, the scores are sigmoids, and a query may be
    found in several classes; with K + 1, the scores are a softmax whose last class means "no object", and every query
    has its most probable class. (In transformers 5.24 the first are Conditional, Deformable and DAB-DETR, RT-DETR,
    RF-DETR, LW-DETR and D-FINE; the second are DETR, Table Transformer and YOLOS.) Boxes are clipped to the image.

    Args:
        model: a `…ForObjectDetection`.
        num_classes: K.
    """

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.num_classes = num_classes

    def forward(self, images_BCHW: Tensor) -> list[Detections]:
        output = self.model(pixel_values=images_BCHW)
        logits_BQK = output.logits.float()
        if logits_BQK.shape[2] == self.num_classes + 1:
            scores_BQK = logits_BQK.softmax(2)[..., :-1]
            scores_BQK = scores_BQK * (scores_BQK == scores_BQK.amax(2, keepdim=True))
        else:
            scores_BQK = logits_BQK.sigmoid()
        height, width = images_BCHW.shape[2:]
        centre_BQ2, size_BQ2 = output.pred_boxes.float().split(2, 2)
        boxes_BQ4 = torch.cat([centre_BQ2 - size_BQ2 / 2, centre_BQ2 + size_BQ2 / 2], 2)
        return detections(scores_BQK, boxes_BQ4 * boxes_BQ4.new_tensor([width, height] * 2), (height, width), iou=None)

    def losses(self, images_BCHW: Tensor, boxes: Sequence[Tensor], labels: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the model's own loss, as one term."""
        height, width = images_BCHW.shape[2:]
        targets = [
            {
                "class_labels": labels_N,
                "boxes": torch.cat([(boxes_N4[:, :2] + boxes_N4[:, 2:]) / 2, boxes_N4[:, 2:] - boxes_N4[:, :2]], 1)
                / boxes_N4.new_tensor([width, height] * 2),
            }
            for boxes_N4, labels_N in zip(boxes, labels, strict=True)
        ]
        return {"loss": self.model(pixel_values=images_BCHW, labels=targets).loss}


def create_transformers_detector(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    new_head: bool = False,
    **options: Any,
) -> TransformersDetector:
    """Create a detector of transformers.

    Args:
        name: `hf:OWNER/NAME` on the hub, or `hf:FOLDER`, a folder with `config.json`.
        num_classes: K (default: as many as the configuration has). If the weights of the name have another number, the
            layers that depend on it are made anew.
        pretrained: load the weights of the name.
        weights: file of weights to load instead; all must fit.
        new_head: must be False; use `num_classes` with the weights of the name.
        options: changes of the configuration, e.g. `num_queries`.

    Raises:
        UsageError: transformers is missing, there is no such model or folder, or `new_head` is True.
        DataError: the folder or the weights cannot be used.
    """
    if new_head:
        require_weights(weights)
    if new_head:
        raise UsageError(
            f"{name} is a detector, whose head cannot be left out of a file of weights; leave out --new-head"
        )
    transformers = import_transformers()
    config = read_config(transformers, name, options)
    _keep_backbone_random(config)
    if num_classes is not None:
        config.num_labels = num_classes
    auto = transformers.AutoModelForObjectDetection
    if pretrained and weights is None:
        model, missing = load_pretrained(
            auto, transformers, name, source_of(name), config=config, ignore_mismatched_sizes=True
        )
        heads = (config.num_labels, config.num_labels + 1)
        if num_classes is not None:  # then the layers with one output for each class are new
            state = model.state_dict()
            missing = [key for key in missing if key not in state or state[key].shape[:1] not in ((n,) for n in heads)]
        if missing:
            raise DataError(
                f"the weights of {name} are incomplete: {len(missing)} missing ({', '.join(missing[:3])}, …)"
            )
    else:
        try:
            with quiet(transformers):
                model = auto.from_config(config, trust_remote_code=False)
        except Exception as error:  # a backbone that cannot be made, or fields that contradict each other
            raise DataError(f"the detector {name} cannot be made ({first_line(error)})") from error
        if weights is not None:
            load_state(model, read_state(weights), weights, name=name)
    made = TransformersDetector(model.float(), config.num_labels)
    remember_architecture(made, name, architecture_of(config.to_dict()))
    return made.train()


def _keep_backbone_random(config: Any) -> None:
    """Do not download a backbone: its weights are among those of the detector, or none are wanted."""
    if hasattr(config, "use_pretrained_backbone"):
        config.use_pretrained_backbone = False
    if (backbone := getattr(config, "backbone_config", None)) is not None:
        _keep_backbone_random(backbone)


def is_transformers_detector(name: str) -> bool:
    """Return whether a name is that of a detector of transformers."""
    transformers = import_transformers()
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as CLASSIFIERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_OBJECT_DETECTION_MAPPING_NAMES as DETECTORS

    config = read_config(transformers, name, {})
    detects = any("ForObjectDetection" in text for text in config.architectures or ())
    return config.model_type in DETECTORS and (detects or config.model_type not in CLASSIFIERS)
