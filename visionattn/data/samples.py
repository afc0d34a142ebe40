"""Samples and batches of images: their types, and the functions that make them."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import default_collate

from visionattn.data.placement import Placement, Preprocess


class Sample(TypedDict, total=False):
    """One image of a data set; the task determines which keys are present.

    Attributes:
        image: (C, h, w) float32, normalised.
        placement: maps pixels of the source image to pixels of `image`.
        path: of the source image.
        label: number of the class; for images with any number of labels (K,) float32, 1 for the image's labels, else 0.
        box: (4,) xyxy of the object in pixels of the input.
        mask: (h, w) bool, True on the object.
        boxes: (N, 4) xyxy in pixels of the input.
        labels: (N,) int64, class of each box.
        crowd: (N,) bool, see `Annotated`.
        area: (N,) in pixels of the source.
        image_id: the image's id in a COCO file, otherwise a running number.
    """

    image: Tensor
    placement: Placement
    path: str
    label: int | NDArray[np.float32]
    box: Tensor
    mask: Tensor
    boxes: Tensor
    labels: Tensor
    crowd: Tensor
    area: Tensor
    image_id: int


class Batch(TypedDict, total=False):
    """B samples with the keys of `Sample`: tensors and numbers are stacked, other values become lists of B items."""

    image: Tensor
    placement: list[Placement]
    path: list[str]
    label: Tensor
    box: Tensor
    mask: Tensor
    boxes: list[Tensor]
    labels: list[Tensor]
    crowd: list[Tensor]
    area: list[Tensor]
    image_id: Tensor


class Transform(ABC):
    """A random change of an image, with the affine map from the original to the changed pixels."""

    @abstractmethod
    def __call__(self, image_HWC: NDArray[np.uint8], seed: int) -> tuple[NDArray[np.uint8], Placement]:
        """Change one image.

        Args:
            image_HWC: (H, W, 3) uint8 RGB.
            seed: determines the random change.

        Returns:
            The changed image, (h, w, 3) uint8 RGB of any size, and the placement from the original to this image.
        """


def prepare(
    image_HWC: NDArray[np.uint8],
    preprocess: Preprocess,
    augment: Transform | None = None,
    seed: int = 0,
    *,
    boxes: NDArray[np.float64] | None = None,
) -> Sample:
    """Make a sample from a decoded image.

    Args:
        image_HWC: (H, W, 3) uint8 RGB.
        preprocess: resizes and normalises, after `augment`.
        augment: changes the image before `preprocess` (default: no change).
        seed: random seed of `augment`.
        boxes: (N, 4) xyxy in pixels of the image (default: the sample has no boxes).

    Returns:
        A sample with `image` (C, h, w) and `placement`. If boxes are given, also with `boxes` (N, 4), clipped at the
        edges of the augmented image and of the input.
    """
    if augment is not None:
        image_HWC, moved = augment(image_HWC, seed)
        boxes = None if boxes is None else moved.boxes_to_input(boxes)
    image_CHW, placement = preprocess(image_HWC)
    sample: Sample = {"image": torch.from_numpy(image_CHW)}
    if boxes is not None:
        sample["boxes"] = torch.from_numpy(placement.boxes_to_input(boxes)).float()
    sample["placement"] = placement if augment is None else placement @ moved
    return sample


_LISTS = frozenset({"path", "placement", "boxes", "labels", "crowd", "area"})


def collate(samples: Sequence[Mapping[str, object]]) -> Batch:
    """Join samples into a batch: stack numbers and tensors, make lists of the values of the keys in `_LISTS`."""
    batch = {
        key: [sample[key] for sample in samples]
        if key in _LISTS
        else default_collate([sample[key] for sample in samples])
        for key in samples[0]
    }
    return cast(Batch, batch)
