"""Reports of a glimpse network's test: the density of fixations over all images, and an animation for one image.

Shapes: B images, T glimpses, S scales, H × W the model's input.
"""

from pathlib import Path

import lightning as L
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from visionattn.data import Batch, Preprocess, write_animation, write_image
from visionattn.drawing import animate_glimpses, draw_fixation_density
from visionattn.evaluation import inside
from visionattn.maps import Heatmaps, coverage
from visionattn.models import GlimpseNetwork
from visionattn.overlays import trace_glimpses
from visionattn.training.callbacks.run_files import SourceImages, class_names_of, images_of, network_of


class FixationDensity:
    """Count how often each pixel of the input was inside the finest patch of a glimpse, and inside an object's box.

    Attributes:
        images: number of images counted.
    """

    def __init__(self) -> None:
        self.images = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, maps: Heatmaps, batch: Batch) -> None:
        """Count the glimpses of a batch. Heatmaps without glimpses have no effect."""
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
        """Sum the counts over all processes; every process must call this method."""
        if self._sums:
            device = next(iter(self._sums.values())).device
            self.images = int(trainer.strategy.reduce(torch.tensor(self.images, device=device), reduce_op="sum"))
            self._sums = {name: trainer.strategy.reduce(total, reduce_op="sum") for name, total in self._sums.items()}

    def means(self) -> dict[str, NDArray[np.float32]]:
        """Return name → (H, W), means over the images.

        `first glimpse` and `later glimpses`: number of glimpses whose finest patch contains the pixel. `objects'
        boxes`: fraction of the images in which the object's box contains the pixel; only if the data has boxes.
        """
        return {name: (total / self.images).cpu().numpy() for name, total in self._sums.items()}

    def write(self, path: Path) -> None:
        """Write a picture of the means, unless no glimpse was counted."""
        if self._sums:
            title = f"density of fixations over {self.images:,} images"
            write_image(path, draw_fixation_density(self.means(), title=title))


def write_glimpse_animation(
    path: Path, pl_module: L.LightningModule, batch: Batch, dataset: SourceImages, preprocess: Preprocess
) -> None:
    """Write an animation of the glimpses at a batch's first image, with the class probabilities after each glimpse.

    Args:
        path: of the .webp or .gif file.
        pl_module: the task of a `GlimpseNetwork`.
        batch: of the data.
        dataset: reads the source images.
        preprocess: of the data.
    """
    images_1CHW = images_of(pl_module, batch)[:1]
    network = network_of(pl_module)
    assert isinstance(network, GlimpseNetwork)
    (trace,) = trace_glimpses(network, images_1CHW, batch["placement"][:1], preprocess)
    frames = animate_glimpses(
        dataset.read_source(batch["path"][0]),
        trace["boxes"],
        trace["patches"],
        probabilities_TK=trace["probabilities"],
        class_names=class_names_of(pl_module),
        truth=int(batch["label"][0]),
    )
    write_animation(path, frames)
