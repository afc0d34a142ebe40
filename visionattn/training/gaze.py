"""What a test tells of where a network looked: over all images, and glimpse by glimpse at one.

Shapes: B images, T glimpses, S scales, H × W the model's input.
"""

from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor

from visionattn.data import write_animation, write_image
from visionattn.maps import Maps
from visionattn.maps.gaze import coverage
from visionattn.maps.localisation import inside
from visionattn.overlay.gaze import gaze_animation, gaze_density
from visionattn.overlay.glimpses import follow_gaze


class GazeDensity:
    """How often each pixel of the input was seen sharply, the mean over images; and how often it lay in an object's
    box, where these are known."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._images: Tensor | None = None

    def add(self, maps: Maps, batch: dict[str, Any]) -> None:
        """Count the glimpses at a batch; of maps without glimpses nothing."""
        if maps.boxes is None:
            return
        size = batch["image"].shape[-2], batch["image"].shape[-1]
        finest_BT14 = maps.boxes[:, :, :1]
        parts = {"first glimpse": finest_BT14[:, :1], "later glimpses": finest_BT14[:, 1:]}
        found = {name: coverage(part_BT14, size) for name, part_BT14 in parts.items() if part_BT14.shape[1]}
        if "box" in batch:
            found["objects' boxes"] = inside(batch["box"], size).float()
        for name, map_BHW in found.items():
            self._sums[name] = self._sums.get(name, 0) + map_BHW.sum(0)
        self._images = map_BHW.new_tensor(len(map_BHW)) + (0 if self._images is None else self._images)

    def gather(self, trainer: L.Trainer) -> None:
        """Sum over all processes; each of them calls this."""
        if self._images is not None:
            self._images = trainer.strategy.reduce(self._images, reduce_op="sum")
            self._sums = {name: trainer.strategy.reduce(total, reduce_op="sum") for name, total in self._sums.items()}

    def write(self, path: Path) -> bool:
        """Write the picture; False where no glimpse was counted."""
        if self._images is None:
            return False
        means = {name: (total / self._images).cpu().numpy() for name, total in self._sums.items()}
        title = f"where {int(self._images):,} images were seen sharply"
        write_image(path, gaze_density(means, title=title))
        return True


def write_gaze(path: Path, pl_module: Any, batch: dict[str, Any], dataset: Any, preprocess: Any) -> None:
    """Write the glimpses at the first image of a batch, one after another, with what is believed after each."""
    one = batch["image"][:1].float()
    (told,) = follow_gaze(pl_module.network, one, batch["placement"][:1], preprocess)
    frames = gaze_animation(
        dataset.read_source(batch["path"][0]),
        told["boxes"],
        told["patches"],
        probabilities_TK=told["probabilities"],
        class_names=getattr(pl_module, "class_names", ()),
        truth=int(batch["label"][0]),
    )
    write_animation(path, frames)
