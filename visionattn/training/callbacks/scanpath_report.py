"""What a test tells of where a network looked: over all images, and glimpse by glimpse at one.

Shapes: B images, T glimpses, S scales, H × W the model's input.
"""

from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.data import Preprocess, write_animation, write_image
from visionattn.drawing.scanpath import gaze_animation, gaze_density
from visionattn.evaluation.localisation import inside
from visionattn.maps import Maps
from visionattn.maps.gaze import coverage
from visionattn.overlays.glimpses import follow_gaze


class GazeDensity:
    """How often each pixel of the input was seen sharply, and how often it lay in an object's box where these are
    known: means over images.

    Attributes:
        images: how many were counted.
    """

    def __init__(self) -> None:
        self.images = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, maps: Maps, batch: dict[str, Any]) -> None:
        """Count the glimpses at a batch; of maps without glimpses nothing."""
        if maps.boxes is None:
            return
        size = batch["image"].shape[-2], batch["image"].shape[-1]
        finest_BT14 = maps.boxes[:, :, :1]
        found = {"first glimpse": coverage(finest_BT14[:, :1], size)}
        if finest_BT14.shape[1] > 1:
            found["later glimpses"] = coverage(finest_BT14[:, 1:], size)
        if "box" in batch:
            found["objects' boxes"] = inside(batch["box"], size).float()
        for name, map_BHW in found.items():
            total_HW = map_BHW.sum(0)
            self._sums[name] = self._sums[name] + total_HW if name in self._sums else total_HW
        self.images += len(finest_BT14)

    def gather(self, trainer: L.Trainer) -> None:
        """Sum over all processes; each of them calls this."""
        if self._sums:
            device = next(iter(self._sums.values())).device
            self.images = int(trainer.strategy.reduce(torch.tensor(self.images, device=device), reduce_op="sum"))
            self._sums = {name: trainer.strategy.reduce(total, reduce_op="sum") for name, total in self._sums.items()}

    def means(self) -> dict[str, NDArray[np.float32]]:
        """Name → (H, W): the mean number of glimpses that saw a pixel sharply, first and later ones apart, and the
        share of images in which it lay in the object's box."""
        return {name: (total / self.images).cpu().numpy() for name, total in self._sums.items()}

    def write(self, path: Path) -> None:
        """Draw it; nothing where no glimpse was counted."""
        if self._sums:
            write_image(path, gaze_density(self.means(), title=f"where {self.images:,} images were seen sharply"))


def write_gaze(path: Path, pl_module: Any, batch: dict[str, Any], dataset: Any, preprocess: Preprocess) -> None:
    """Write the glimpses at the first image of a batch, one after another, with what is believed after each."""
    images_1CHW = batch["image"][:1].float()
    (told,) = follow_gaze(pl_module.network, images_1CHW, batch["placement"][:1], preprocess)
    frames = gaze_animation(
        dataset.read_source(batch["path"][0]),
        told["boxes"],
        told["patches"],
        probabilities_TK=told["probabilities"],
        class_names=getattr(pl_module, "class_names", ()),
        truth=int(batch["label"][0]),
    )
    write_animation(path, frames)
