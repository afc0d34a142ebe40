"""Reports of a test of a glimpse network: density of fixations over all images, and an animation of one image.

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
from visionattn.training.callbacks.run_files import SourceImages, class_names_of, network_of


class FixationDensity:
    """Counts how often each pixel of the input was read at the finest scale, and how often it lay in an object's box.

    Attributes:
        images: number of images counted.
    """

    def __init__(self) -> None:
        self.images = 0
        self._sums: dict[str, Tensor] = {}

    def add(self, maps: Heatmaps, batch: Batch) -> None:
        """Count the glimpses of a batch; does nothing for heatmaps without glimpses."""
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
        """Sum over all processes; every process must call this."""
        if self._sums:
            device = next(iter(self._sums.values())).device
            self.images = int(trainer.strategy.reduce(torch.tensor(self.images, device=device), reduce_op="sum"))
            self._sums = {name: trainer.strategy.reduce(total, reduce_op="sum") for name, total in self._sums.items()}

    def means(self) -> dict[str, NDArray[np.float32]]:
        """Return name → (H, W), means over the images.

        `first glimpse` and `later glimpses`: number of glimpses that read the pixel at the finest scale. `objects'
        boxes`: fraction of the images in which the pixel lies in the object's box; only if the data has boxes.
        """
        return {name: (total / self.images).cpu().numpy() for name, total in self._sums.items()}

    def write(self, path: Path) -> None:
        """Draw the means into a file; does nothing if no glimpse was counted."""
        if self._sums:
            write_image(
                path, draw_fixation_density(self.means(), title=f"where {self.images:,} images were seen sharply")
            )


def write_glimpse_animation(
    path: Path, pl_module: L.LightningModule, batch: Batch, dataset: SourceImages, preprocess: Preprocess
) -> None:
    """Write an animation of the glimpses at the first image of a batch, with the class probabilities after each.

    Args:
        path: of the .webp or .gif.
        pl_module: the task of a `GlimpseNetwork`.
        batch: of the data.
        dataset: reads the source images.
        preprocess: of the data.
    """
    images_1CHW = batch["image"][:1].float()
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
