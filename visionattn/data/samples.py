"""From a picture to a sample, and from samples to a batch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import default_collate

from visionattn.data.placement import Placement, Preprocess


class Transform(ABC):
    """Changes a picture at random, and says where its pixels went."""

    @abstractmethod
    def __call__(self, image_HWC: NDArray[np.uint8], seed: int) -> tuple[NDArray[np.uint8], Placement]:
        """Change one picture: (H, W, 3) uint8 RGB → the same of any size; equal seeds give equal changes."""


def prepare(
    image_HWC: NDArray[np.uint8],
    preprocess: Preprocess,
    augment: Transform | None = None,
    seed: int = 0,
    *,
    boxes: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Make the `image` (3, h, w) and the `placement` of a sample from its picture (H, W, 3), uint8 RGB.

    Boxes (N, 4) of the picture come along as `boxes`, cut where the augmentation cut the picture.
    """
    if augment is not None:
        image_HWC, moved = augment(image_HWC, seed)
        boxes = None if boxes is None else moved.boxes_to_input(boxes)
    image_CHW, placement = preprocess(image_HWC)
    sample: dict[str, Any] = {"image": torch.from_numpy(image_CHW)}
    if boxes is not None:
        sample["boxes"] = torch.from_numpy(placement.boxes_to_input(boxes)).float()
    return {**sample, "placement": placement if augment is None else placement @ moved}


def collate(samples: Sequence[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    """Join samples into a batch: tensors and numbers are stacked; paths, placements and boxes become lists.

    What is a batch already, from a data set that draws many samples at once, stays as it is.
    """
    if isinstance(samples, dict):
        return samples
    listed = {"path", "placement", "boxes", "labels", "crowd", "area"}
    return {
        key: [sample[key] for sample in samples]
        if key in listed
        else default_collate([sample[key] for sample in samples])
        for key in samples[0]
    }
