"""Attention in computer vision: train models that attend, see where they looked, and measure whether to believe it.

    import visionattn as va

    va.overlay(model, "cat.jpg")      the picture that shows where a model looked
    va.heatmap(model, "cat.jpg")      the same with its numbers
    va.explore(model, ["cat.jpg"])    a page to explore it: patches, heads, layers, methods and how far to believe them
    va.insert(model, mechanism)       put a mechanism into a model
    va.load("best.ckpt")              the task of a run, whose `network` is the model

The names and the packages are imported when they are first used; `import visionattn` itself costs nothing.
"""

from typing import TYPE_CHECKING

from visionattn._lazy import lazy

if TYPE_CHECKING:
    from visionattn import attention as attention
    from visionattn import data as data
    from visionattn import maps as maps
    from visionattn import models as models
    from visionattn import tasks as tasks
    from visionattn import training as training
    from visionattn.attention.insertion import insert as insert
    from visionattn.overlay.explorer import explore as explore
    from visionattn.overlay.heatmaps import Heatmap as Heatmap
    from visionattn.overlay.heatmaps import heatmap as heatmap
    from visionattn.overlay.heatmaps import overlay as overlay
    from visionattn.training.checkpoints import load as load

__getattr__, __dir__ = lazy(
    __name__,
    {
        "attention.insertion": ("insert",),
        "overlay.explorer": ("explore",),
        "overlay.heatmaps": ("Heatmap", "heatmap"),
        "training.checkpoints": ("load",),
    },
    packages=("attention", "data", "maps", "models", "overlay", "tasks", "training"),
)
