"""Heatmaps as pictures; `visionattn.overlay.export.export` writes those of whole folders.

The package itself is called like a function, as `visionattn.overlay(model, "cat.jpg")`: see `heatmaps.overlay`.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn.overlay.draw import COLORMAPS as COLORMAPS
    from visionattn.overlay.draw import Tile as Tile
    from visionattn.overlay.draw import blend as blend
    from visionattn.overlay.draw import boxes as boxes
    from visionattn.overlay.draw import colour_bar as colour_bar
    from visionattn.overlay.draw import contour as contour
    from visionattn.overlay.draw import draw_box as draw_box
    from visionattn.overlay.draw import heat as heat
    from visionattn.overlay.draw import sheet as sheet
    from visionattn.overlay.draw import side_by_side as side_by_side
    from visionattn.overlay.draw import top_mask as top_mask
    from visionattn.overlay.gaze import draw_gaze as draw_gaze
    from visionattn.overlay.gaze import gaze_animation as gaze_animation
    from visionattn.overlay.gaze import gaze_density as gaze_density
    from visionattn.overlay.glimpses import follow_gaze as follow_gaze
    from visionattn.overlay.heatmaps import Heatmap as Heatmap
    from visionattn.overlay.heatmaps import heatmap as heatmap
    from visionattn.overlay.render import Style as Style
    from visionattn.overlay.render import peak as peak
    from visionattn.overlay.report import Summary as Summary
    from visionattn.overlay.views import View as View

__getattr__, __dir__ = lazy(
    __name__,
    {
        "draw": (
            "COLORMAPS",
            "Tile",
            "blend",
            "boxes",
            "colour_bar",
            "contour",
            "draw_box",
            "heat",
            "sheet",
            "side_by_side",
            "top_mask",
        ),
        "gaze": ("draw_gaze", "gaze_animation", "gaze_density"),
        "glimpses": ("follow_gaze",),
        "heatmaps": ("Heatmap", "heatmap"),
        "render": ("Style", "peak"),
        "report": ("Summary",),
        "views": ("View",),
    },
)


class _Callable(ModuleType):
    """A package has the name that the function should have, too; so the package is what is called."""

    def __call__(self, model: Any, image: Any, **options: Any) -> Any:
        from visionattn.overlay.heatmaps import overlay

        return overlay(model, image, **options)

    @property
    def __signature__(self) -> Any:
        import inspect

        from visionattn.overlay.heatmaps import overlay

        return inspect.signature(overlay)


sys.modules[__name__].__class__ = _Callable
