"""Draw the learned spans of a network with adaptive-span attention during training."""

import math

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import Callback
from numpy.typing import NDArray

from visionattn.attention import AdaptiveSpan
from visionattn.data import write_image
from visionattn.drawing import Tile, heat, sheet
from visionattn.training.callbacks.run_files import _folder


class DrawSpans(Callback):
    """Write `overlays/spans.png` into the run after every validation: the reach of each head, with a row per layer.

    For networks without adaptive spans, nothing is written.
    """

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = {name: part for name, part in pl_module.named_modules() if isinstance(part, AdaptiveSpan)}
        folder = _folder(trainer)
        if layers and folder is not None and trainer.is_global_zero and not trainer.sanity_checking:
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / "spans.png", _span_sheet(layers, f"spans after epoch {trainer.current_epoch}"))


def _span_sheet(layers: dict[str, AdaptiveSpan], title: str) -> NDArray[np.uint8]:
    tiles = []
    for name, part in layers.items():
        extent = math.ceil(part.max_span + part.ramp)
        for head, reach in enumerate(part.reach(extent).detach().float().cpu().numpy()):
            layer = name.removesuffix(".mechanism").removesuffix(".attn")
            layer = layer.removeprefix("network.").removeprefix("backbone.")
            tiles.append(Tile(heat(reach), [f"{part.spans[head]:.1f} patches", f"{layer}, head {head}"]))
    return sheet(tiles, title=title, columns=max(part.num_heads for part in layers.values()), width=120)
