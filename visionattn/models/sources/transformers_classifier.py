"""Classifiers of Hugging Face transformers, from the hub or from a folder, with their preprocessing and class names.

A model is read as data: weights are tensors, and code that a repository or a folder brings is never run.

Shapes: B batch, C channels, H rows, W columns, K classes, D features.
"""

import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.errors import DataError, UsageError, first_line
from visionattn.models.architectures import remember_architecture
from visionattn.models.sources.transformers_source import (
    PREFIX,
    architecture_of,
    import_transformers,
    load_pretrained,
    loading_options,
    quiet,
    read_config,
    source_of,
)
from visionattn.models.weights import head_of, load_classifier, outputs_of, read_state, require_weights

_ZERO_SHOT = ("clip", "siglip")
"""Types of models that compare an image with texts."""


class TransformersClassifier(nn.Module):
    """A classifier of transformers: (B, C, H, W), normalised → logits (B, K), or features (B, D) without a head.

    Args:
        model: a `…ForImageClassification`, whose output has `logits`.
        num_classes: K; 0 if the model has no head.
    """

    def __init__(self, model: nn.Module, num_classes: int) -> None:
        super().__init__()
        self.model = model
        self.num_classes = num_classes
        self.image_size = getattr(model.config, "image_size", None)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        logits: Tensor = self.model(pixel_values=x_BCHW).logits
        return logits


class ZeroShotClassifier(nn.Module):
    """Compare images with texts that name the classes, by CLIP or SigLIP; the texts are encoded once.

        logits_k = exp(s) cos(image, text_k) + b        s, b: the model's learned scale and, for SigLIP, bias

    The logits equal the model's own `logits_per_image` (Radford et al. 2021, 2103.00020; Zhai et al. 2023, 2303.15343).
    Deviation: probabilities of visionattn are a softmax over the classes, also for SigLIP, whose own are sigmoids.

    Args:
        vision_model: (B, 3, H, W) → an output with `pooler_output`, (B, E).
        projection: (B, E) → features of images (B, D).
        texts_KD: normalised features of the texts.
        scale, bias: exp(s) and b.
        image_size: side of the input, pixels.

    Shape: (B, 3, H, W), normalised → logits (B, K).
    """

    texts_KD: Tensor  # noqa: N815 - a shape suffix
    scale: Tensor
    bias: Tensor

    def __init__(
        self,
        vision_model: nn.Module,
        projection: nn.Module,
        texts_KD: Tensor,
        *,
        scale: float,
        bias: float = 0.0,
        image_size: int,
    ) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.projection = projection
        self.num_classes = len(texts_KD)
        self.image_size = image_size
        self.register_buffer("texts_KD", texts_KD)
        self.register_buffer("scale", torch.tensor(scale))
        self.register_buffer("bias", torch.tensor(bias))

    def forward(self, x_BCHW: Tensor) -> Tensor:
        features_BD = self.projection(self.vision_model(pixel_values=x_BCHW).pooler_output)
        return F.normalize(features_BD, dim=-1) @ self.texts_KD.T * self.scale + self.bias


def create_transformers_classifier(
    name: str,
    *,
    num_classes: int | None = None,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    new_head: bool = False,
    **options: Any,
) -> nn.Module:
    """Create an image classifier of transformers.

    Args:
        name: `hf:OWNER/NAME` on the hub, or `hf:FOLDER`, a folder with `config.json`.
        num_classes: K (default: as many as in the weights; without a head there, the model returns features). If the
            weights have another number of outputs, the model gets a new head.
        pretrained, weights, new_head: as for `create_backbone`; pretrained weights are those of the name.
        options: changes of the configuration, e.g. `hidden_dropout_prob`.

    Raises:
        UsageError: transformers is missing, or there is no such model or folder.
        DataError: the folder or the weights cannot be used, or transformers has no classifier of this type.
    """
    if new_head:
        require_weights(weights)
    transformers = import_transformers()
    config = read_config(transformers, name, options)
    _check_type(config, name)
    if pretrained and weights is None:
        model, outputs = _pretrained(transformers, name, source_of(name), config, num_classes)
    else:
        if num_classes is not None and weights is None:
            config.num_labels = num_classes
        with quiet(transformers):
            model = transformers.AutoModelForImageClassification.from_config(config, trust_remote_code=False)
        heads = _heads(model, config.num_labels)
        if weights is not None:
            state = read_state(weights)
            load_classifier(model, state, weights, heads=heads, num_classes=num_classes, new_head=new_head, name=name)
        outputs = outputs_of(model, heads[0])
    made = TransformersClassifier(model.float(), outputs)
    remember_architecture(made, name, architecture_of(config.to_dict()))
    return made.train()  # as every new module is; transformers returns pretrained models in evaluation mode


def create_zero_shot_classifier(name: str, texts: Sequence[str], *, pretrained: bool = True) -> nn.Module:
    """Create a classifier whose classes are texts, from a CLIP or SigLIP of transformers.

    Args:
        name: see `create_transformers_classifier`.
        texts: one text for each class, e.g. `a cat`; at least two.
        pretrained: load the weights of the name; else they are random (default: True).

    Raises:
        UsageError: transformers is missing, there are fewer than two texts, or there is no such model or folder.
        DataError: the folder or the weights cannot be used.
    """
    if len(texts) < 2:
        raise UsageError(f'{name} chooses among texts; give at least two, as --classes "a cat, a dog"')
    source = source_of(name)
    transformers = import_transformers()
    try:
        with quiet(transformers, source):
            tokenizer = transformers.AutoTokenizer.from_pretrained(source, **loading_options(source))
    except Exception as error:  # a missing file, a broken one, or one that needs code
        raise DataError(f"the tokenizer of {name} cannot be loaded ({first_line(error)})") from error
    if pretrained:
        model, missing = load_pretrained(transformers.AutoModel, transformers, name, source)
        if missing:
            raise DataError(
                f"the weights of {name} are incomplete: {len(missing)} missing ({', '.join(missing[:3])}, …)"
            )
    else:
        model = transformers.AutoModel.from_config(read_config(transformers, name, {}))
    model = model.float().eval()
    length = model.config.text_config.max_position_embeddings
    tokens = tokenizer(
        list(texts),
        # SigLIP was trained with texts padded to this length
        padding="max_length" if model.config.model_type == "siglip" else True,
        truncation=True,
        max_length=length,
        return_tensors="pt",
    )
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask") if key in tokens}
    if model.config.model_type == "siglip":
        inputs.pop("attention_mask", None)
    with torch.no_grad():
        texts_KD = model.text_model(**inputs).pooler_output
        texts_KD = getattr(model, "text_projection", nn.Identity())(texts_KD)
    bias = getattr(model, "logit_bias", None)
    return ZeroShotClassifier(
        model.vision_model,
        getattr(model, "visual_projection", None) or nn.Identity(),
        F.normalize(texts_KD, dim=-1),
        scale=model.logit_scale.exp().item(),
        bias=0.0 if bias is None else bias.item(),
        image_size=model.config.vision_config.image_size,
    )


def is_zero_shot(name: str) -> bool:
    """Return whether a name is that of a model which compares images with texts, and has no head of classes."""
    config = read_config(import_transformers(), name, {})
    classifies = any("ForImageClassification" in text for text in config.architectures or ())
    return config.model_type in _ZERO_SHOT and not classifies


def transformers_class_names(name: str) -> tuple[str, ...]:
    """Return the class names of a model, its configuration's `id2label`; () if they are only numbered."""
    names = read_config(import_transformers(), name, {}).id2label or {}
    ordered = tuple(str(names[index]) for index in sorted(names))
    return () if all(text == f"LABEL_{index}" for index, text in enumerate(ordered)) else ordered


def _check_type(config: Any, name: str) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES as KNOWN

    if config.model_type == "timm_wrapper":
        raise UsageError(f"{name} is a model of timm; name it hf-hub:{name.removeprefix(PREFIX)}")
    if config.model_type not in KNOWN:
        raise DataError(f"{name} is of type {config.model_type}; transformers has no image classifier of this type")


def _pretrained(
    transformers: ModuleType, name: str, source: str, config: Any, num_classes: int | None
) -> tuple[nn.Module, int]:
    """Return a classifier with the weights of its name, and its number of outputs."""
    auto = transformers.AutoModelForImageClassification
    if num_classes is not None:
        config.num_labels = num_classes  # a head of another size than in the weights is made anew
    model, missing = load_pretrained(auto, transformers, name, source, config=config, ignore_mismatched_sizes=True)
    outputs = config.num_labels
    if wrong := [key for key in missing if key.startswith(_body(model))]:
        some = ", ".join(wrong[:3])
        raise DataError(
            f"the weights of {name} do not fit a {type(model).__name__}: {len(wrong)} missing or of another shape "
            f"({some}{', …' if len(wrong) > 3 else ''})"
        )
    if missing and num_classes is None:  # such as DINOv2: the model has features and no classes
        for place in {key.rpartition(".")[0] for key in missing}:
            parent, _, last = place.rpartition(".")
            setattr(model.get_submodule(parent), last, nn.Identity())
        outputs = 0
    return model, outputs


def _body(model: nn.Module) -> str:
    """Return the prefix of the weights in the largest part of a classifier, e.g. `vit.`."""
    largest = max(model.named_children(), key=lambda child: sum(value.numel() for value in child[1].parameters()))
    return f"{largest[0]}."


def _heads(model: nn.Module, outputs: int) -> tuple[str, ...]:
    """Return the names of the layers after the largest part that have one output for each class."""
    body = _body(model)
    layers = (name for name, part in model.named_modules() if isinstance(part, (nn.Linear, nn.Conv2d)))
    heads = tuple(name for name in layers if not name.startswith(body) and outputs_of(model, name) == outputs)
    return heads or (head_of(model),)  # Perceiver's head is in its largest part
