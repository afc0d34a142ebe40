"""Targets beyond one output: margins, evidence against a class, regions of segmentations, similarity to embeddings.

Each is a function from a model's output to (B,) scores, and may be the `target` of any method that explains a score.

Shapes: B images, K outputs, H rows, W columns of a segmentation, h × w of a mask, D channels of an embedding.
"""

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from visionattn.capture import run, undisturbed
from visionattn.errors import DataError, UsageError
from visionattn.maps.method import check_images, first_tensor, pick, scores_of


@dataclass(frozen=True)
class Margin:
    """The score of one class minus the score of another: what speaks for `index` and not for `other`.

    Raises:
        UsageError: when called, the model has no such outputs.
    """

    index: int
    other: int

    def __call__(self, output: object) -> Tensor:
        return pick(output, self.index)[0] - pick(output, self.other)[0]


@dataclass(frozen=True)
class Against:
    """The negative score of a class: what speaks against it. For a model with one logit, `Against(0)` is the answer no.

    Raises:
        UsageError: when called, the model has no such output.
    """

    index: int

    def __call__(self, output: object) -> Tensor:
        return -pick(output, self.index)[0]


@dataclass(frozen=True, eq=False)
class Region:
    """The mean score of a class over a region of a segmentation (B, K, H, W).

    Args:
        index: the class.
        mask: (h, w) or (B, h, w), true or nonzero in the region; it spans the model's input and is resampled to H × W.
            Default: the pixels in which the class has the highest score. Methods that change the image (occlusion,
            integrated gradients …) need a mask, since the pixels of the class change with the image.

    Raises:
        UsageError: when called, the output has no (B, K, H, W) scores, no such class, or the mask does not fit it.
        DataError: when called, the region of an image has no pixel.
    """

    index: int
    mask: Tensor | None = None

    def __call__(self, output: object) -> Tensor:
        scores_BKHW = _segmentation(output)
        count = scores_BKHW.shape[1]
        if not 0 <= self.index < count:
            raise UsageError(f"target {self.index} is out of range: the model has {count} outputs, 0 to {count - 1}")
        inside_BHW = self._inside(scores_BKHW.detach())
        size_B = inside_BHW.sum((1, 2))
        if not size_B.all():
            what = f"no pixel has class {self.index}" if self.mask is None else "the mask selects no pixel"
            raise DataError(f"{what} in image {int((size_B == 0).nonzero()[0])} of the batch, so the region is empty")
        return (scores_BKHW[:, self.index].float() * inside_BHW).sum((1, 2)) / size_B  # a sum exceeds float16

    def _inside(self, scores_BKHW: Tensor) -> Tensor:
        if self.mask is None:
            return scores_BKHW.argmax(1) == self.index
        mask = (self.mask != 0).to(scores_BKHW.device)
        if mask.ndim not in (2, 3) or (mask.ndim == 3 and len(mask) != len(scores_BKHW)):
            raise UsageError(
                f"the mask must be (h, w) or ({len(scores_BKHW)}, h, w) for this batch, got {tuple(mask.shape)}"
            )
        mask_BHW = mask.expand(len(scores_BKHW), *mask.shape[-2:])
        if mask_BHW.shape[1:] != scores_BKHW.shape[2:]:  # a cell belongs to the region if any part of it does
            mask_BHW = F.adaptive_max_pool2d(mask_BHW[:, None].float(), scores_BKHW.shape[2:])[:, 0] > 0
        return mask_BHW


def _segmentation(output: object) -> Tensor:
    """Return the (B, K, H, W) scores in a model's output."""
    scores_BKHW = first_tensor(output, axes=4)
    if scores_BKHW is not None:
        return scores_BKHW
    kind = f"of {tuple(output.shape)}" if isinstance(output, Tensor) else f", a {type(output).__name__},"
    raise UsageError(f"a region needs the (B, K, H, W) scores of a segmentation, and the output {kind} holds none")


@dataclass(frozen=True, eq=False)
class Similarity:
    """The cosine similarity of the model's embedding to a reference: another image's embedding, or a text's.

    Args:
        reference: (D,) or (1, D), or an output of transformers that holds an embedding. For a text, the text encoder's
            embedding, e.g. of `get_text_features` or `encode_text`.

    Raises:
        UsageError: `reference` is no single embedding. When called, the model's embedding has another length.
    """

    reference: Any  # an output of a user's model

    def __post_init__(self) -> None:
        reference = embedding_of(self.reference).detach()
        if len(reference) != 1:
            raise UsageError(f"a reference is one embedding (D,), got {tuple(reference.shape)}")
        object.__setattr__(self, "reference", reference)

    @classmethod
    def to_image(cls, model: nn.Module, image_CHW: Tensor) -> "Similarity":
        """Return the similarity to an image's embedding by the same model.

        Args:
            model: an encoder; for a classifier, the scores are the embedding.
            image_CHW: the image, normalised for the model.
        """
        check_images(image_CHW[None])
        with undisturbed(model) as bare:
            return cls(run(bare, image_CHW[None]))

    def __call__(self, output: object) -> Tensor:
        found_BD = embedding_of(output)
        if found_BD.shape[1] != self.reference.shape[1]:
            raise UsageError(
                f"the model's embedding has {found_BD.shape[1]} values, and the reference has {self.reference.shape[1]}"
            )
        return F.cosine_similarity(found_BD, self.reference.to(found_BD), dim=1)


def embedding_of(output: Any) -> Tensor:
    """Return the embedding (B, D) in a model's output: `image_embeds`, `text_embeds`, `pooler_output` or its scores.

    Raises:
        UsageError: there is none.
    """
    for name in ("image_embeds", "text_embeds", "pooler_output"):
        found = getattr(output, name, None)
        if isinstance(found, Tensor):
            return found.flatten(1)  # some encoders of transformers pool to (B, D, 1, 1)
    if isinstance(output, Tensor) and output.ndim == 1:
        return output[None]
    return scores_of(output)


class ImageEncoder(nn.Module):
    """The image encoder of a model that also encodes texts, such as CLIP and SigLIP: (B, C, H, W) → embeddings (B, D).

    Args:
        model: a model with `get_image_features` (transformers) or `encode_image` (open_clip).

    Raises:
        UsageError: the model has neither, so it cannot compare an image with a text.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        names = [name for name in ("get_image_features", "encode_image") if callable(getattr(model, name, None))]
        if not names:
            raise UsageError(
                f"this {type(model).__name__} has no image encoder that belongs to a text encoder: neither "
                "get_image_features nor encode_image"
            )
        self.model, self._encode = model, names[0]

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return embedding_of(getattr(self.model, self._encode)(images_BCHW))
