"""Batches of other data modules, such as tuples (images, labels), in the form that the callbacks draw."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from visionattn.data import Batch, Placement, Preprocess
from visionattn.errors import UsageError


@dataclass(frozen=True)
class ShownImages:
    """The images of a batch as pictures, in place of the data set that would read their sources."""

    pictures: list[NDArray[np.uint8]]

    def read_source(self, path: str) -> NDArray[np.uint8]:
        """Return the picture (H, W, 3) whose number in the batch is `path`."""
        return self.pictures[int(path)]


def is_plain(batch: object) -> bool:
    """Return whether a batch comes from another data module than visionattn's."""
    return not (isinstance(batch, Mapping) and "placement" in batch)


def convert(batch: object, preprocess: Preprocess | None, count: int) -> tuple[Batch, ShownImages]:
    """Convert the first samples of a batch.

    Args:
        batch: a tensor (B, C, H, W), or a sequence or mapping that holds one. The labels are the first (B,) tensor of
            whole numbers, if there is one.
        preprocess: how the images were normalised (default: by ImageNet's mean and std, or for one channel not at all).
        count: largest number of samples.

    Raises:
        UsageError: the batch holds no images, or their number of channels is neither 1 nor 3.
    """
    parts: list[object] = [batch] if isinstance(batch, Tensor) else []
    if isinstance(batch, Mapping):
        parts = list(batch.values())
    elif isinstance(batch, (tuple, list)):
        parts = list(batch)
    tensors = [part for part in parts if isinstance(part, Tensor)]
    images = next((part for part in tensors if part.ndim == 4 and part.is_floating_point()), None)
    if images is None:
        raise UsageError(
            f"the validation batches ({type(batch).__name__}) hold no images (B, C, H, W) of floating point; "
            "remove OverlaySamples, or give such batches"
        )
    if images.shape[1] not in (1, 3):
        raise UsageError(f"OverlaySamples shows images of 1 or 3 channels, got {images.shape[1]}; remove the callback")
    images = images[:count]
    if preprocess is None:
        preprocess = Preprocess(mean=(0.0,), std=(1.0,)) if images.shape[1] == 1 else Preprocess()
    pictures = [preprocess.denormalise(image.float().cpu().numpy()) for image in images]
    found: dict[str, object] = {
        "image": images,
        "path": [str(number) for number in range(len(images))],
        "placement": [Placement.identity(picture.shape[:2]) for picture in pictures],
    }
    whole = [part for part in tensors if part.ndim == 1 and not part.is_floating_point() and len(part) >= len(images)]
    if whole:
        found["label"] = whole[0][:count]
    return cast(Batch, found), ShownImages(pictures)
