"""Heatmaps as pictures."""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.overlay.draw import Tile as Tile
    from visionattn.overlay.draw import blend as blend
    from visionattn.overlay.draw import sheet as sheet
    from visionattn.overlay.export import export as export

__getattr__, __dir__ = lazy(__name__, {"draw": ("Tile", "blend", "sheet"), "export": ("export",)})
