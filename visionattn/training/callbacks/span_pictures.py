"""Pictures of adaptive spans while a network trains."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Callback

from visionattn.attention import AdaptiveSpan
from visionattn.data import write_image
from visionattn.drawing.overlay import heat
from visionattn.drawing.sheets import Tile, sheet
from visionattn.training.callbacks.run_files import _folder


class DrawSpans(Callback):
    """Write `overlays/spans.png` into the run after every validation: how far each head reaches, a row a layer.

    For networks whose heads have adaptive spans; in others it does nothing.
    """

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = {name: part for name, part in pl_module.named_modules() if isinstance(part, AdaptiveSpan)}
        folder = _folder(trainer)
        if layers and folder is not None and trainer.is_global_zero and not trainer.sanity_checking:
            folder.mkdir(parents=True, exist_ok=True)
            write_image(folder / "spans.png", _span_sheet(layers, f"spans after epoch {trainer.current_epoch}"))


def _span_sheet(layers: dict[str, AdaptiveSpan], title: str) -> Any:
    tiles = []
    for name, part in layers.items():
        extent = math.ceil(part.max_span + part.ramp)
        for head, reach in enumerate(part.reach(extent).detach().float().cpu().numpy()):
            layer = name.removesuffix(".mechanism").removesuffix(".attn")
            layer = layer.removeprefix("network.").removeprefix("backbone.")
            tiles.append(Tile(heat(reach), [f"{part.spans[head]:.1f} patches", f"{layer}, head {head}"]))
    return sheet(tiles, title=title, columns=max(part.num_heads for part in layers.values()), width=120)
